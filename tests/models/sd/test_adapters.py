# SPDX-License-Identifier: Apache-2.0
"""Files from elsewhere on a base: the weights and the picture are PyTorch's."""

import copy
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from command_runs import TEXT_FILE, UNET_FILE, tensors

from gift_jax.models import safetensors_io
from gift_jax.models.folder import ModelFolder
from gift_jax.models.load import load_model
from gift_jax.models.sd.adapters import AdapterFiles, read_adapters
from gift_jax.models.tokenizer import load_tokenizer
from gift_jax.runtime.errors import UserError
from gift_jax.sampling import sampler

LORA_FILE = "pytorch_lora_weights.safetensors"
TARGETS = ["to_k", "to_out.0", "conv1", "proj_in", "ff.net.2", "time_emb_proj"]
PATTERNS = {"rank_pattern": {"attn2.to_k": 2}, "alpha_pattern": {"attn2.to_k": 5}}
TEXT_TARGETS = ["q_proj", "out_proj", "fc1"]
ATTN = "mid_block.attentions.0.transformer_blocks.0.attn1"
TABLE = "text_model.embeddings.token_embedding.weight"

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's and diffusers' own


@pytest.fixture(scope="module")
def pipeline(tiny_folder):
    """() -> PyTorch's pipeline of the tiny model, a copy of its own."""
    pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(str(tiny_folder))
    loaded.set_progress_bar_config(disable=True)

    def call():
        parts = {name: copy.deepcopy(part) for name, part in loaded.components.items()}
        own = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
        own.set_progress_bar_config(disable=True)
        return own

    return call


def peft_model(module, targets, **fields):
    """A module with random LoRA factors, by peft."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(target_modules=targets, init_lora_weights=False, **fields)
    return get_peft_model(module, config)


def factors(model, prefix=""):
    """{name: array} of a peft model's factors, by the names of the module itself."""
    from peft.utils import get_peft_model_state_dict

    return {
        prefix + name.removeprefix("base_model.model."): tensor.detach().numpy()
        for name, tensor in get_peft_model_state_dict(model).items()
    }


def save(path, arrays, **metadata):
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(arrays, path, {"format": "pt"} | metadata)
    return path


def our_weights(folder, **files):
    """{PyTorch's name: array} of what files change of a folder."""
    own = read_adapters(AdapterFiles(**files), folder)
    return {
        safetensors_io.torch_name(path): safetensors_io.to_torch_layout(path, array)
        for path, array in ModelFolder(folder, "", own).adapted_params().items()
    }


def assert_weights_of(module, folder, file, **files):
    """Ours are the module's, and what the files leave alone is the folder's."""
    ours, base = our_weights(folder, **files), tensors(folder, file)
    theirs = {
        name: tensor.detach().numpy() for name, tensor in module.state_dict().items()
    }
    if file == TEXT_FILE:
        theirs = {
            f"text_model.{n.removeprefix('text_model.')}": a for n, a in theirs.items()
        }
    for name, before in base.items():
        expected = theirs[name]
        if name in ours:
            assert np.abs(expected - before).max() > 1e-3, name
            np.testing.assert_allclose(ours[name], expected, atol=2e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(expected, before, err_msg=name)


# --- LoRA -----------------------------------------------------------------------------


def old_name(name):
    """A UNet's name as diffusers wrote it before 0.21: in processors."""
    for new, old in (
        (".to_out.0.", ".to_out."),
        (".lora_A", ".down"),
        (".lora_B", ".up"),
    ):
        name = name.replace(new, old)
    for projection in ("to_k", "to_out"):
        name = name.replace(f".{projection}.", f".processor.{projection}_lora.")
    return name


def diffusers_name(name):
    return name.replace(".lora_A", ".lora.down").replace(".lora_B", ".lora.up")


@pytest.mark.parametrize(
    "rename, scale", [(str, 1.0), (diffusers_name, -0.5), (old_name, 1.0)]
)
def test_lora_of_the_unet_by_diffusers_names(
    pipeline, tiny_folder, tmp_path, rename, scale
):
    """With a prefix, and alpha equal to the rank, whatever it is."""
    targets = ["to_k", "to_out.0"] if rename is old_name else TARGETS
    fields = {"rank_pattern": PATTERNS["rank_pattern"]}
    arrays = factors(peft_model(pipeline().unet, targets, r=4, **fields), "unet.")
    file = save(tmp_path / LORA_FILE, {rename(n): a for n, a in arrays.items()})
    theirs = pipeline()
    theirs.load_lora_weights(str(tmp_path), weight_name=LORA_FILE)
    theirs.fuse_lora(components=["unet"], lora_scale=scale)
    theirs.unet.unload_lora()
    text = f"{file}:{scale}" if scale != 1 else str(tmp_path)  # a folder, too
    assert_weights_of(theirs.unet, tiny_folder, UNET_FILE, lora=(text,))


def test_lora_with_diffusers_metadata(pipeline, tiny_folder, tmp_path):
    from peft import LoraConfig

    own = pipeline()
    own.unet.add_adapter(
        LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=TARGETS,
            init_lora_weights=False,
            **PATTERNS,
        )
    )
    own.unet.save_lora_adapter(str(tmp_path / "plain"))  # names without unet.
    theirs = pipeline()
    theirs.unet.load_lora_adapter(
        str(tmp_path / "plain"), prefix=None, weight_name=LORA_FILE
    )
    theirs.unet.fuse_lora()
    theirs.unet.unload_lora()
    plain = tmp_path / "plain" / LORA_FILE
    assert_weights_of(theirs.unet, tiny_folder, UNET_FILE, lora=(str(plain),))
    metadata = json.loads(safetensors_io.read_metadata(plain)["lora_adapter_metadata"])
    file = save(
        tmp_path / LORA_FILE,
        {f"unet.{n}": a for n, a in safetensors.numpy.load_file(plain).items()},
        lora_adapter_metadata=json.dumps({f"unet.{n}": v for n, v in metadata.items()}),
    )
    theirs = pipeline()
    theirs.load_lora_weights(str(tmp_path), weight_name=LORA_FILE)
    theirs.fuse_lora(components=["unet"])
    theirs.unet.unload_lora()
    assert_weights_of(theirs.unet, tiny_folder, UNET_FILE, lora=(str(file),))


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_lora_in_a_folder_of_peft(pipeline, tiny_folder, tmp_path, component):
    fields = {"r": 4, "lora_alpha": 9, "use_rslora": True}
    fields |= PATTERNS if component == "unet" else {}
    targets = TARGETS if component == "unet" else TEXT_TARGETS
    model = peft_model(getattr(pipeline(), component), targets, **fields)
    model.save_pretrained(str(tmp_path))
    from peft import PeftModel

    base = getattr(pipeline(), component)
    theirs = PeftModel.from_pretrained(base, str(tmp_path)).merge_and_unload()
    file = UNET_FILE if component == "unet" else TEXT_FILE
    assert_weights_of(theirs, tiny_folder, file, lora=(str(tmp_path),))


@pytest.mark.parametrize("kind", ["peft", "diffusers", "old"])
@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_lora_of_the_text_encoder(pipeline, tiny_folder, tmp_path, kind, prefix):
    from diffusers.utils import convert_state_dict_to_peft

    model = peft_model(
        pipeline().text_encoder, TEXT_TARGETS[: 3 - (kind == "old")], r=8
    )
    arrays, renamed = factors(model), {}
    for name, array in arrays.items():
        name = prefix + name.removeprefix("text_model.")
        if kind != "peft":
            for new, old in ((".lora_A", ".down"), (".lora_B", ".up")):
                name = name.replace(new, old)
            for new, old in (("q_proj", "to_q"), ("out_proj", "to_out"), ("fc1", "")):
                long = f"{new}.lora_linear_layer."
                short = f"{old}_lora." if kind == "old" else long
                name = name.replace(f"{new}.", short)
        renamed[name] = array
    if kind != "peft":  # diffusers knows these names
        assert {
            n.removeprefix(prefix) for n in convert_state_dict_to_peft(renamed)
        } == {n.removeprefix("text_model.") for n in arrays}
    renamed = {f"text_encoder.{name}": array for name, array in renamed.items()}
    file = save(tmp_path / LORA_FILE, renamed)
    theirs = model.merge_and_unload()
    assert_weights_of(theirs, tiny_folder, TEXT_FILE, lora=(str(file),))


def test_files_add_up_in_order(tiny_folder, tmp_path, rng):
    name = f"{ATTN}.to_q"
    before = tensors(tiny_folder)[f"{name}.weight"]
    W, A, B = (
        rng.normal(size=s).astype(np.float32) for s in ((64, 64), (3, 64), (64, 3))
    )
    unet = save(tmp_path / "unet.safetensors", {f"unet.{name}.weight": W})
    half = {f"unet.{name}.lora.down.weight": A.astype(np.float16)}
    half[f"unet.{name}.lora.up.weight"] = B.astype(np.float16)
    lora = save(tmp_path / "lora.safetensors", half)
    both = our_weights(
        tiny_folder, unet_tensors=(str(unet),), lora=(f"{lora}:2", f"{lora}:0.5")
    )
    A, B = (x.astype(np.float16).astype(np.float64) for x in (A, B))
    assert list(both) == [f"{name}.weight"] and before.shape == W.shape
    np.testing.assert_allclose(both[f"{name}.weight"], W + 2.5 * B @ A, atol=1e-4)


# --- pictures -------------------------------------------------------------------------

PROMPT = "a <thing> cat"


def embeddings(tmp_path, vectors=3):
    rows = np.random.default_rng(3).normal(size=(vectors, 32)).astype(np.float32)
    return save(tmp_path / "learned_embeds.safetensors", {"<thing>": rows})


def lora_file(pipeline, folder, tmp_path, names):
    """A LoRA of the UNet; by kohya's names of the text encoder too, alpha not rank."""
    if names == "kohya":
        arrays = kohya_lora(folder, UNET_FILE, KOHYA_TARGETS, alpha=6)
        arrays |= kohya_lora(folder, TEXT_FILE, TEXT_TARGETS, alpha=3)
    else:
        arrays = factors(peft_model(pipeline().unet, TARGETS, r=4), "unet.")
    return save(tmp_path / LORA_FILE, arrays)


KOHYA_TARGETS = ["to_q", "to_k", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in"]


def kohya_lora(folder, file, targets, alpha=4.0, rank=4, prefix="", rename=str):
    """Random factors by kohya's names: {name: array}, without torch.

    alpha, rank: a number, or a function of a layer's place. rename: module's name ->
    another one, before dots become underscores.
    """
    rng, arrays = np.random.default_rng(6), {}
    prefix = prefix or {UNET_FILE: "lora_unet_", TEXT_FILE: "lora_te_"}[file]
    shapes = {
        name.removesuffix(".weight"): array.shape
        for name, array in sorted(tensors(folder, file).items())
        if name.endswith(tuple(f"{target}.weight" for target in targets))
    }
    for i, (module, (out, *inner)) in enumerate(shapes.items()):
        r, a = (x(i) if callable(x) else x for x in (rank, alpha))
        name = prefix + rename(module).replace(".", "_")
        down, up = (r, *inner), (out, r, *[1] * len(inner[1:]))
        arrays[f"{name}.lora_down.weight"] = 0.2 * rng.normal(size=down)
        arrays[f"{name}.lora_up.weight"] = 0.2 * rng.normal(size=up)
        if a:
            arrays[f"{name}.alpha"] = np.asarray(a)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def unet_file(folder, tmp_path):
    """A file of the UNet's cross-attention, changed."""
    rng = np.random.default_rng(4)
    arrays = {
        name: array + 0.1 * rng.normal(size=array.shape).astype(np.float32)
        for name, array in tensors(folder).items()
        if ".attn2." in name
    }
    return save(tmp_path / "erased.safetensors", arrays)


def our_picture(model, latents):
    cond, uncond = (model.encode_text([p]) for p in (PROMPT, ""))
    sample = sampler.make_sampler(model, "ddim", 4, 4.0, True)
    args = model.params["unet"], model.params["vae"], cond, uncond, latents
    return np.asarray(sample(*args)).astype(int)


@pytest.mark.parametrize("names", ["diffusers", "kohya"])
def test_picture_with_all_three_is_pytorchs(
    pipeline, tiny, tiny_folder, tmp_path, names
):
    import torch

    theirs, erased = pipeline(), unet_file(tiny_folder, tmp_path)
    lora = lora_file(pipeline, tiny_folder, tmp_path, names)
    learned = embeddings(tmp_path)
    state = safetensors.numpy.load_file(erased)
    state = {name: torch.tensor(array) for name, array in state.items()}
    theirs.unet.load_state_dict(state, strict=False)
    theirs.load_textual_inversion(str(tmp_path), weight_name=learned.name)
    theirs.load_lora_weights(str(tmp_path), weight_name=lora.name)
    theirs.set_adapters(theirs.get_active_adapters(), 0.8)
    files = AdapterFiles((str(erased),), (f"{lora}:0.8",), (str(learned),))
    model = load_model(str(tiny_folder), added=files)
    latents = sampler.initial_latents(jax.random.key(3), 1, tiny.latent_shape)
    ours = our_picture(model, latents)
    without_lora = dataclasses.replace(files, lora=())
    before = our_picture(load_model(str(tiny_folder), added=without_lora), latents)
    assert np.abs(ours - before).mean() > 1
    images = theirs(
        [PROMPT],
        latents=torch.tensor(np.asarray(latents)),
        num_inference_steps=4,
        guidance_scale=4.0,
        output_type="pil",
    ).images
    assert np.abs(ours - np.stack([np.asarray(image) for image in images])).max() <= 1


@pytest.mark.parametrize(
    "rows, token", [((32,), ""), ((1, 32), ""), ((2, 32), ":<other>")]
)
def test_embeddings_become_the_last_rows(tiny_folder, tmp_path, rng, rows, token):
    vectors = rng.normal(size=rows).astype(np.float32)
    file = save(tmp_path / "x.safetensors", {"emb_params" if token else "<x>": vectors})
    own = read_adapters(
        AdapterFiles(textual_inversion=(f"{file}{token}",)), tiny_folder
    )
    folder = ModelFolder(tiny_folder, "", own)
    table = our_weights(tiny_folder, textual_inversion=(f"{file}{token}",))[TABLE]
    words, known = (
        folder.load_tokenizer(),
        len(load_tokenizer(tiny_folder / "tokenizer")),
    )
    assert len(words) == len(table) == known + vectors.size // 32
    np.testing.assert_array_equal(table[known:], vectors.reshape(-1, 32))
    np.testing.assert_array_equal(
        table[:known], tensors(tiny_folder, TEXT_FILE)[TABLE][:known]
    )
    name = token.removeprefix(":") or "<x>"
    assert words(name, add_special_tokens=False).input_ids == [known]


# --- what is refused ------------------------------------------------------------------


def refused(folder, message, **files):
    with pytest.raises(UserError, match=message) as caught:
        our_weights(folder, **files)
    assert "\n" not in str(caught.value)


A, B = np.ones((2, 64), np.float32), np.ones((64, 2), np.float32)
NAME = f"unet.{ATTN}.to_q"
PAIR = {f"{NAME}.lora_A.weight": A, f"{NAME}.lora_B.weight": B}


@pytest.mark.parametrize(
    "arrays, message",
    [
        (PAIR | {f"{NAME}.lora_magnitude_vector": A}, "vector is of a DoRA, which"),
        (PAIR | {f"{NAME}.dora_scale": A}, "dora_scale is of a DoRA, which is not"),
        ({f"{NAME}.lokr_w1": A}, "lokr_w1 is of a LoKr or LoHa"),
        ({}, "has no tensors"),
        (
            PAIR | {f"{NAME}.alpha": A},
            "alpha is no tensor of a LoRA.*; 1 of 3 tensors do",
        ),
        (PAIR | {f"{NAME}.lora_B.bias": A}, "lora_B.bias is no tensor of a LoRA"),
        ({f"{NAME}.lora_A.weight": A}, "lora_A.weight has no other half; 1 of 1"),
        ({f"{NAME}.lora.up.weight": B}, "lora.up.weight has no other half"),
        (PAIR | {f"{NAME}.lora.up.weight": B}, "lora_B.weight is there twice, also as"),
        (
            {n.replace("mid_block", "middle"): a for n, a in PAIR.items()},
            "changes middle.attentions.*which this model does not have; 2 of 2",
        ),
        ({n.replace("to_q", "norm"): a for n, a in PAIR.items()}, "does not have"),
        (
            {n.replace("unet", "text_encoder_2"): a for n, a in PAIR.items()},
            "changes text_encoder_2, which this model does not have",
        ),
        (PAIR | {f"{NAME}.lora_A.weight": A[:, :32]}, r"shape .*, \[64, 64\]; 2 of 2"),
        (PAIR | {f"{NAME}.lora_A.weight": A[:0]}, "gives no update"),
        (PAIR | {f"{NAME}.lora_A.weight": A.astype(int)}, "dtype I64; must be one of"),
        (
            PAIR | {f"{NAME}.lora_A.weight": A * np.nan},
            "to_q.weight is not finite with",
        ),
    ],
)
def test_lora_that_does_not_fit_is_one_line(tiny_folder, tmp_path, arrays, message):
    file = save(tmp_path / "x.safetensors", arrays)
    refused(tiny_folder, message, lora=(str(file),))


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"unet.r": 4}, "r=4, lora_alpha=8 for mid_block.*of rank 2"),
        ({}, "r=8, lora_alpha=8"),  # peft's defaults
        ({"unet.r": 2, "unet.lora_alpha": "x"}, "lora_alpha='x'"),
        ({"unet.r": 2, "unet.use_dora": True}, "use_dora=true is not supported"),
        ({"unet.r": 2, "unet.kasa_config": {"a": 1}}, "kasa_config=.*is not supported"),
        ({"unet.r": 2, "unet.init_lora_weights": "pissa"}, 'weights="pissa" is not'),
        ({"unet.r": 2, "unet.rank_pattern": {"(a+)+": 2}}, "rank_pattern=.* is not"),
        ([], "must be a JSON object"),
        ("{", "is not JSON"),
    ],
)
def test_metadata_that_is_not_computed_is_refused(
    tiny_folder, tmp_path, metadata, message
):
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    file = save(tmp_path / "x.safetensors", PAIR, lora_adapter_metadata=text)
    refused(tiny_folder, message, lora=(str(file),))


def test_peft_adapter_needs_its_config(tiny_folder, tmp_path):
    arrays = {n.replace("unet.", "base_model.model."): a for n, a in PAIR.items()}
    save(tmp_path / "adapter_model.safetensors", arrays)
    config = tmp_path / "adapter_config.json"
    refused(tiny_folder, "adapter_config.json: no such file", lora=(str(tmp_path),))
    config.write_text('{"r": 2')
    refused(tiny_folder, "adapter_config.json: not valid JSON", lora=(str(tmp_path),))
    config.write_text('{"peft_type": "LOHA", "r": 2}')
    refused(tiny_folder, 'peft_type="LOHA" is not supported', lora=(str(tmp_path),))


@pytest.mark.parametrize(
    "arrays, message",
    [
        (
            {f"{NAME}.weight": A},
            r"to_q.weight has shape \[2, 64\], the model's \[64, 64\]",
        ),
        (
            {f"{ATTN}.to_q.weight": np.eye(64), "model.diffusion_model.x": A},
            "model.diffusion_model.x is no tensor of this model's UNet.*; 1 of 2",
        ),
        (PAIR, "lora_A.weight is no tensor of this model's UNet"),
        (
            {f"{p}{ATTN}.to_q.weight": np.eye(64) for p in ("", "unet.")},
            "twice, with and without unet.",
        ),
        ({}, "has no tensors"),
    ],
)
def test_unet_tensors_that_do_not_fit_are_one_line(
    tiny_folder, tmp_path, arrays, message
):
    file = save(tmp_path / "x.safetensors", arrays)
    refused(tiny_folder, message, unet_tensors=(str(file),))


def test_tensors_of_two_files_do_not_hide_each_other(tiny_folder, tmp_path):
    file = unet_file(tiny_folder, tmp_path)
    refused(tiny_folder, "in another file", unet_tensors=(str(file), str(file)))


@pytest.mark.parametrize(
    "arrays, message",
    [
        (
            {f"{NAME}.weight": np.ones((64, 32))},
            "to_q.weight is no token, but a tensor",
        ),
        ({"<a>": A, "<b>": A}, "has 2 tensors; a textual inversion has one"),
        ({"<a>": A}, "<a> has shape .2, 64., but this model's embeddings are 32 wide"),
        ({"<a>": np.ones((0, 32))}, r"shape \[0, 32\]"),
        ({"emb_params": np.ones((1, 32))}, "names no token; give one, as FILE:TOKEN"),
        ({"a": np.ones((1, 32))}, "token 'a' is in the model's vocabulary already"),
        ({"a b": np.ones((1, 32))}, "'a b' must be one word"),
        (
            {"<A>": np.ones((2, 32))},
            "'<A>' has capitals, of which diffusers reads the f",
        ),
    ],
)
def test_embeddings_that_do_not_fit_are_one_line(
    tiny_folder, tmp_path, arrays, message
):
    arrays = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    file = save(tmp_path / "x.safetensors", arrays)
    refused(tiny_folder, message, textual_inversion=(str(file),))


def test_token_is_given_once(tiny_folder, tmp_path):
    file = str(embeddings(tmp_path))
    refused(tiny_folder, "vocabulary already", textual_inversion=(file, file))
    both = our_weights(tiny_folder, textual_inversion=(file, f"{file}:<other>"))[TABLE]
    np.testing.assert_array_equal(both[-3:], both[-6:-3])


@pytest.mark.parametrize("field", ["lora", "textual_inversion", "unet_tensors"])
def test_damaged_files_are_one_line(tiny_folder, tmp_path, field):
    file = tmp_path / "x.safetensors"
    refused(
        tiny_folder, f"{field}='.*x.safetensors': no such file", **{field: (str(file),)}
    )
    whole = save(file, PAIR).read_bytes()
    for damaged in (
        b"",
        whole[:40],
        whole[:-8],
        b"version https://git-lfs",
        whole + b"x",
    ):
        file.write_bytes(damaged)
        refused(tiny_folder, "x.safetensors: ", **{field: (str(file),)})
    pickle = shutil.copy(file, tmp_path / "x.bin")
    refused(tiny_folder, "is a pickle", **{field: (str(pickle),)})
    refused(tiny_folder, "no such file", **{field: (str(tmp_path),)})


def test_scale_is_a_number(tiny_folder, tmp_path):
    file = save(tmp_path / "x:1.safetensors", PAIR)
    assert len(our_weights(tiny_folder, lora=(str(file), f"{file}:0.5"))) == 1
    for scale in ("x", "nan", ""):
        refused(tiny_folder, f"'{scale}' is no scale", lora=(f"{file}:{scale}",))
