# SPDX-License-Identifier: Apache-2.0
"""Reading and writing model folders: names, layouts, dtypes, mistakes, export."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from tiny_model import TINY_TEXT, TINY_VAE, WHOLE_UNET, random_params

from gift_jax.models import exports, safetensors_io, weights
from gift_jax.models.kinds import KINDS
from gift_jax.models.sd import stable_diffusion
from gift_jax.runtime.errors import UserError

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
TRAINED = "mid_block/attentions_0/transformer_blocks_0/attn2/to_k/kernel"
TRAINED_NAME = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny model's folder, to spoil."""
    return shutil.copytree(tiny_folder, tmp_path / "sd")


def edit_json(file, **changes):
    value = json.loads(file.read_text())
    value.update(changes)
    file.write_text(json.dumps(value))


def test_names_are_pytorchs():
    def name(path):
        return safetensors_io.torch_name(path)

    blocks = "down_blocks_0/attentions_1/transformer_blocks_0"
    assert name(f"{blocks}/attn2/to_out_0/kernel") == (
        "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0.weight"
    )
    assert name(f"{blocks}/ff/net_0/proj/bias").endswith(".ff.net.0.proj.bias")
    assert name("time_embedding/linear_1/kernel") == "time_embedding.linear_1.weight"
    assert name("decoder/mid_block/attentions_0/query/kernel").endswith(".to_q.weight")
    assert name("text_model/embeddings/token_embedding/embedding") == (
        "text_model.embeddings.token_embedding.weight"
    )


@pytest.mark.parametrize("denoiser", weights.DENOISERS)
def test_joined_paths_tell_the_component(denoiser):
    parts = {name: {"a/kernel": name} for name in weights.TEXT_ENCODERS}
    parts |= {denoiser: {"a/kernel": denoiser}}
    parts["text_encoder"] = {"text_model/a/kernel": "text_encoder"}
    joined = {
        weights.joined_path(component, path): array
        for component, flat in parts.items()
        for path, array in flat.items()
    }
    assert len(joined) == len(parts)
    assert weights.by_component(joined, denoiser) == parts


def test_denoiser_is_the_component_that_the_folder_has(tiny_folder, tmp_path):
    assert weights.denoiser_of(tiny_folder) == "unet"
    (tmp_path / "transformer").mkdir()
    assert weights.denoiser_of(tmp_path) == "transformer"


@pytest.mark.parametrize("kind", ["unet", "vae", "text_encoder"])
def test_load_returns_what_was_saved(tiny_folder, kind):
    module, params, config = weights.load_component(tiny_folder / kind, kind)
    seed = ["unet", "vae", "text_encoder"].index(kind)
    expected = flatten_dict(random_params(KINDS[kind].build(config), seed))
    loaded = flatten_dict(params)
    assert loaded.keys() == expected.keys()
    for path in expected:
        np.testing.assert_array_equal(loaded[path], expected[path])


def test_pytorch_reads_our_unet_whole(tiny_folder):
    pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel

    _, info = UNet2DConditionModel.from_pretrained(
        str(tiny_folder / "unet"), output_loading_info=True
    )
    assert info["missing_keys"] == [] and info["unexpected_keys"] == []


def test_load_reads_pytorchs_folder(tmp_path):
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(**TINY_VAE)
    vae.save_pretrained(str(tmp_path))
    _, params, _ = weights.load_component(tmp_path, "vae")
    ours = params["encoder"]["mid_block"]["attentions_0"]["query"]["kernel"]
    theirs = vae.encoder.mid_block.attentions[0].to_q.weight.detach().numpy()
    np.testing.assert_array_equal(ours, theirs.T)


def test_load_reads_old_vae_attention_names(folder, tiny):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    for new, old in ((".to_q.", ".query."), (".to_out.0.", ".proj_attn.")):
        tensors = {name.replace(new, old): t for name, t in tensors.items()}
    assert any(".query." in name for name in tensors)
    safetensors.numpy.save_file(tensors, file)
    _, params, _ = weights.load_component(folder / "vae", "vae")
    jax.tree.map(np.testing.assert_array_equal, params, tiny.params["vae"])


def test_load_reads_shards(folder, tiny):
    file = folder / UNET_FILE
    tensors = safetensors.numpy.load_file(file)
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in halves.items():
        safetensors.numpy.save_file({n: tensors[n] for n in part}, file.parent / shard)
    weight_map = {name: shard for shard, part in halves.items() for name in part}
    index = file.with_name(file.name + ".index.json")
    index.write_text(json.dumps({"weight_map": weight_map}))
    file.unlink()
    _, params, _ = weights.load_component(folder / "unet", "unet")
    jax.tree.map(np.testing.assert_array_equal, params, tiny.params["unet"])
    out = folder.parent / "out"
    exports.export(folder, {TRAINED: np.zeros((32, 64), np.float32)}, out)
    _, params, _ = weights.load_component(out / "unet", "unet")
    assert not flatten_dict(params, sep="/")[TRAINED].any()


def write_variant(folder, variant, value, shards=1):
    """Writes the UNet again under a variant's names, TRAINED filled with value."""
    unet = folder / "unet"
    tensors_ = safetensors.numpy.load_file(folder / UNET_FILE)
    tensors_[TRAINED_NAME] = np.full_like(tensors_[TRAINED_NAME], value)
    stem, names = f"diffusion_pytorch_model.{variant}", sorted(tensors_)
    files = [f"{stem}.safetensors"]
    if shards > 1:
        files = [
            f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)
        ]
        weight_map = {name: files[i % shards] for i, name in enumerate(names)}
        index = unet / f"diffusion_pytorch_model.safetensors.index.{variant}.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    for i, file in enumerate(files):
        part = {name: tensors_[name] for name in names[i::shards]}
        safetensors.numpy.save_file(part, unet / file)


def test_export_replaces_text_tensors_and_leaves_their_variants_out(
    folder, tiny, tmp_path
):
    text = folder / "text_encoder"
    copy = (text / "model.safetensors").read_bytes()
    (text / "model.fp16.safetensors").write_bytes(copy)
    table = np.zeros((600, 32), np.float32)  # more rows than the base's
    norm = "text_model/final_layer_norm/scale"
    changed = {weights.TOKEN_TABLE: table, norm: np.full(32, 2.0, np.float32)}
    exports.export(folder, changed, tmp_path / "out", dtype="F16")
    out = tmp_path / "out" / "text_encoder"
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors"}
    module, params, _ = weights.load_component(out, "text_encoder")
    assert module.config.vocab_size == 600
    flat = flatten_dict(params, sep="/")
    assert flat[weights.TOKEN_TABLE].shape == (600, 32)
    assert np.all(flat[norm] == 2.0)
    before = flatten_dict(tiny.params["text_encoder"], sep="/")
    for path in before.keys() - changed.keys():
        expected = np.asarray(before[path], np.float16).astype(np.float32)
        np.testing.assert_array_equal(flat[path], expected)
    wrong = {weights.TOKEN_TABLE: np.zeros((600, 31), np.float32)}
    with pytest.raises(UserError, match="has PyTorch shape .600, 31."):
        exports.export(folder, wrong, tmp_path / "wrong")
    with pytest.raises(UserError, match="its text encoder has no parameter"):
        exports.export(folder, {"text_model/x": table}, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("shards", [1, 2])
def test_load_and_export_take_the_variant_asked_for(folder, tmp_path, shards):
    write_variant(folder, "fp16", 0.125, shards)
    plain = stable_diffusion.load(folder)
    model = stable_diffusion.load(folder, variant="fp16")
    assert np.all(flatten_dict(model.params["unet"], sep="/")[TRAINED] == 0.125)
    assert not np.all(flatten_dict(plain.params["unet"], sep="/")[TRAINED] == 0.125)
    assert (model.variant, plain.variant) == ("fp16", "")
    exports.export(folder, {}, tmp_path / "out", variant="fp16")
    exported = {p.name for p in (tmp_path / "out" / "unet").glob("*model*")}
    assert all("fp16" in name for name in exported)
    assert len(exported) == (1 if shards == 1 else 3)
    out = stable_diffusion.load(tmp_path / "out")  # the only variant there is
    assert np.all(flatten_dict(out.params["unet"], sep="/")[TRAINED] == 0.125)
    with pytest.raises(UserError, match="unet: has no files of variant 'bf16'"):
        stable_diffusion.load(folder, variant="bf16")


def test_several_variants_and_no_plain_file_need_a_choice(folder):
    for variant in ("fp16", "non_ema"):
        write_variant(folder, variant, 0.125)
    (folder / UNET_FILE).unlink()
    with pytest.raises(UserError, match="only the variants fp16, non_ema; choose one"):
        stable_diffusion.load(folder)
    stable_diffusion.load(folder, variant="non_ema")


def test_a_component_can_be_read_in_part_and_placed_one_by_one(tiny_folder, tiny):
    placed = []

    def place(array):
        placed.append(array.shape)
        return jnp.asarray(array)

    _, params, _ = weights.load_component(
        tiny_folder / "unet", "unet", only={TRAINED}, place=place
    )
    flat = flatten_dict(params, sep="/")
    assert list(flat) == [TRAINED] and placed == [flat[TRAINED].shape]
    whole = flatten_dict(tiny.params["unet"], sep="/")
    np.testing.assert_array_equal(flat[TRAINED], whole[TRAINED])


@pytest.mark.parametrize(
    "dtype, on_disk", [("F16", np.float16), ("BF16", jnp.bfloat16)]
)
def test_export_casts_every_weight_when_asked(
    tiny_folder, tiny, tmp_path, dtype, on_disk
):
    exports.export(tiny_folder, {}, tmp_path / "out", dtype=dtype)
    components = weights.components(tmp_path / "out")
    assert components == ("unet", "vae", "text_encoder")
    for component in components:
        (file,) = (tmp_path / "out" / component).glob("*.safetensors")
        assert {entry.dtype for entry in safetensors_io.read_header(file).values()} == {
            dtype
        }
        assert safetensors_io.read_metadata(file) == {"format": "pt"}
    half = stable_diffusion.load(tmp_path / "out")

    def same(ours, original):
        np.testing.assert_array_equal(ours, original.astype(on_disk).astype(np.float32))

    jax.tree.map(same, half.params, tiny.params)


def test_export_refuses_a_dtype_that_the_weights_do_not_fit(tiny_folder, tmp_path):
    big = {TRAINED: np.full((32, 64), 1e6, np.float32)}
    with pytest.raises(UserError, match=r"to_k\.weight: not finite as F16"):
        exports.export(tiny_folder, big, tmp_path / "out", dtype="F16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("on_disk", [np.float16, jnp.bfloat16])
def test_half_precision_files_load_as_float32(tmp_path, tiny, on_disk):
    params = tiny.params["text_encoder"]
    exports.save_model_folder(tmp_path / "t", TINY_TEXT, params, dtype=on_disk)
    _, loaded, _ = weights.load_component(tmp_path / "t", "text_encoder")

    def same(ours, original):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, original.astype(on_disk).astype(np.float32))

    jax.tree.map(same, loaded, tiny.params["text_encoder"])


def spoil_missing_component(folder):
    shutil.rmtree(folder / "vae")


def spoil_truncated(folder):
    file = folder / UNET_FILE
    file.write_bytes(file.read_bytes()[:-100])


def spoil_header(folder):
    (folder / UNET_FILE).write_bytes(b"\xff" * 64)


def spoil_not_json(folder):
    (folder / "unet" / "config.json").write_text("{")


def spoil_missing_tensor(folder):
    tensors = safetensors.numpy.load_file(folder / UNET_FILE)
    del tensors[TRAINED_NAME]
    safetensors.numpy.save_file(tensors, folder / UNET_FILE)


def spoil_unexpected_tensor(folder):
    tensors = safetensors.numpy.load_file(folder / UNET_FILE)
    safetensors.numpy.save_file(tensors | {"other": np.zeros(1)}, folder / UNET_FILE)


def spoil_shape(folder):
    edit_json(folder / "unet" / "config.json", cross_attention_dim=48)


def spoil_pickle(folder):
    file = folder / UNET_FILE
    file.rename(file.with_suffix(".bin"))


def spoil_no_weights(folder):
    (folder / UNET_FILE).unlink()


def spoil_groups(folder):
    edit_json(folder / "unet" / "config.json", block_out_channels=[48, 64])


def spoil_feature(folder):
    edit_json(folder / "unet" / "config.json", class_embed_type="timestep")


def spoil_block(folder):
    types = ["AttnDownBlock2D", "DownBlock2D"]
    edit_json(folder / "unet" / "config.json", down_block_types=types)


def spoil_index(folder):
    edit_json(folder / "model_index.json", unet=["diffusers", "SD3Transformer2DModel"])


def spoil_tokenizer(folder):
    (folder / "tokenizer" / "vocab.json").unlink()


def spoil_schedule(folder):
    edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type="flow")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_missing_component, r"vae/config\.json: no such file"),
        (spoil_truncated, r"truncated: \d+ bytes, but .* ends at byte"),
        (spoil_header, "truncated or not a safetensors file"),
        (spoil_not_json, r"unet/config\.json: not valid JSON"),
        (spoil_missing_tensor, rf"1 missing tensors, e\.g\. {TRAINED_NAME}"),
        (spoil_unexpected_tensor, r"1 unexpected tensors, e\.g\. other"),
        (spoil_shape, r"attn2\.to_k\.weight has shape .* config\.json says"),
        (spoil_pickle, "a pickle, which can run code"),
        (spoil_no_weights, r"no diffusion_pytorch_model\.safetensors"),
        (spoil_groups, "block_out_channels has 48; must be multiples of"),
        (spoil_feature, "class_embed_type='timestep' is not supported"),
        (spoil_block, r"down_block_types=\['AttnDownBlock2D', .* is not supported"),
        (spoil_index, "unet is SD3Transformer2DModel; must be UNet2DConditionModel"),
        (spoil_tokenizer, r"vocab\.json: no such file"),
        (spoil_schedule, "prediction_type='flow' is not one of: epsilon"),
    ],
)
def test_malformed_folder_is_a_user_error(folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        stable_diffusion.load(folder)
    assert "\n" not in str(caught.value)


def export_one(base, out, value=0.25):
    shape = WHOLE_UNET["cross_attention_dim"], WHOLE_UNET["block_out_channels"][-1]
    exports.export(base, {TRAINED: jnp.full(shape, value)}, out)


def test_export_changes_only_what_was_trained(tiny_folder, tmp_path):
    export_one(tiny_folder, tmp_path / "out")
    before = safetensors.numpy.load_file(tiny_folder / UNET_FILE)
    after = safetensors.numpy.load_file(tmp_path / "out" / UNET_FILE)
    assert list(after) == list(before)
    changed = [n for n in before if before[n].tobytes() != after[n].tobytes()]
    assert changed == [TRAINED_NAME]
    assert (after[TRAINED_NAME] == 0.25).all()
    names = {p.relative_to(tiny_folder) for p in tiny_folder.rglob("*") if p.is_file()}
    for name in names - {next(n for n in names if str(n) == UNET_FILE)}:
        copy = tmp_path / "out" / name
        assert copy.read_bytes() == (tiny_folder / name).read_bytes()


def test_files_can_be_read_by_whom_the_umask_allows(tiny_folder, tmp_path):
    mask = os.umask(0o027)
    try:
        export_one(tiny_folder, tmp_path / "out")
    finally:
        os.umask(mask)
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert {oct(p.stat().st_mode & 0o777) for p in files} == {"0o640"}


def test_export_keeps_the_files_dtype(tiny_folder, tiny, tmp_path):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    params = tiny.params["unet"]
    exports.save_model_folder(base / "unet", WHOLE_UNET, params, dtype=np.float16)
    export_one(base, tmp_path / "out", value=0.1)
    after = safetensors.numpy.load_file(tmp_path / "out" / UNET_FILE)[TRAINED_NAME]
    assert after.dtype == np.float16
    assert (after == np.float16(0.1)).all()
    with pytest.raises(UserError, match="not finite as F16"):
        export_one(base, tmp_path / "big", value=1e6)
    assert not (tmp_path / "big").exists()


def test_export_leaves_out_other_copies_of_the_original_weights(folder, tmp_path):
    (folder / "v1-5-pruned.ckpt").write_bytes(b"original")
    (folder / "v1-5-pruned.safetensors").write_bytes(b"original")
    variant = "diffusion_pytorch_model.fp16.safetensors"
    (folder / "unet" / variant).write_bytes(b"original")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"original")
    (folder / "LICENSE").write_text("license")
    export_one(folder, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "license"
    assert [p for p in (tmp_path / "out").rglob("*") if "v1-5" in p.name] == []
    kept = {p.name for p in (tmp_path / "out" / "unet").iterdir()}
    assert kept == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_export_keeps_a_safety_checker_that_has_only_a_pickle(folder, tmp_path):
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    edit_json(folder / "model_index.json", **checker)
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    (folder / "safety_checker" / "pytorch_model.bin").write_bytes(b"not a pickle")
    export_one(folder, tmp_path / "out")
    kept = tmp_path / "out" / "safety_checker" / "pytorch_model.bin"
    assert kept.read_bytes() == b"not a pickle"
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"the same, safe")
    export_one(folder, tmp_path / "out")
    assert not kept.exists() and kept.with_name("model.safetensors").exists()


def test_export_replaces_an_older_one_and_leaves_no_temporary(folder, tmp_path):
    export_one(folder, tmp_path / "runs" / "out", value=1.0)
    (tmp_path / "runs" / "out" / "stray").write_text("")
    export_one(folder, tmp_path / "runs" / "out", value=2.0)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["out"]
    assert not (tmp_path / "runs" / "out" / "stray").exists()
    after = safetensors.numpy.load_file(tmp_path / "runs" / "out" / UNET_FILE)
    assert (after[TRAINED_NAME] == 2.0).all()


def test_export_refuses_mistakes(folder, tmp_path):
    before = weights.content_hash(folder)
    with pytest.raises(UserError, match="has no parameter 'nothing/kernel'"):
        exports.export(folder, {"nothing/kernel": np.zeros(1)}, tmp_path / "out")
    with pytest.raises(UserError, match=r"has PyTorch shape \[2, 1\]"):
        exports.export(folder, {TRAINED: np.zeros((1, 2))}, tmp_path / "out")
    with pytest.raises(UserError, match="into the base model"):
        export_one(folder, folder / "export")
    with pytest.raises(UserError, match="into the base model"):
        export_one(folder, folder.parent)
    assert not (tmp_path / "out").exists()
    assert weights.content_hash(folder) == before


def test_content_hash_follows_weights_and_configs_only(tiny_folder, folder):
    before = weights.content_hash(folder)
    assert before == weights.content_hash(tiny_folder)
    (folder / "README.md").write_text("new")
    assert weights.content_hash(folder) == before
    edit_json(folder / "vae" / "config.json", scaling_factor=0.6)
    changed = weights.content_hash(folder)
    assert changed != before
    file = folder / UNET_FILE
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert weights.content_hash(folder) not in (before, changed)


def test_export_of_a_half_precision_text_encoder_loads_as_float32(folder, tmp_path):
    text = folder / "text_encoder"
    _, params, config = weights.load_component(text, "text_encoder")
    config |= {"model_type": "clip_text_model", "torch_dtype": "float16"}
    exports.save_model_folder(text, config, params, dtype="float16")
    out = tmp_path / "out"
    exports.export(folder, {}, out)
    exported = json.loads((out / "text_encoder" / "config.json").read_text())
    assert exported == config | {"torch_dtype": "float32"}
    files = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    different = [
        f for f in files if (out / f).read_bytes() != (folder / f).read_bytes()
    ]
    assert [str(f) for f in different] == ["text_encoder/config.json"]
