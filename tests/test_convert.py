# SPDX-License-Identifier: Apache-2.0
"""Between diffusers folders and Orbax checkpoints: byte for byte, or one clear line."""

import filecmp
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from command_runs import UNET_FILE
from tiny_model import TINY_TEXT, random_params, write_tiny

from gift_jax import convert
from gift_jax.models import exports, safetensors_io, weights
from gift_jax.models.kinds import KINDS
from gift_jax.models.sd import stable_diffusion
from gift_jax.runtime.errors import UserError


def same_files(a, b):
    """Asserts that two folders hold the same files, byte for byte."""
    names = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert names and names == sorted(
        p.relative_to(b) for p in b.rglob("*") if p.is_file()
    )
    for name in names:
        assert filecmp.cmp(a / name, b / name, shallow=False), name


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as hubs have them: two dtypes, shards, a buffer, a safety checker."""
    folder = write_tiny(tmp_path_factory.mktemp("published") / "sd")
    params = random_params(KINDS["text_encoder"].build(TINY_TEXT), 5)
    exports.save_model_folder(folder / "text_encoder", TINY_TEXT, params, np.float16)
    text_file = folder / "text_encoder" / "model.safetensors"
    values = safetensors.numpy.load_file(text_file)
    values["text_model.embeddings.position_ids"] = np.arange(16)[None]
    safetensors.numpy.save_file(values, text_file, {"format": "pt"})
    unet = safetensors.numpy.load_file(folder / UNET_FILE)
    names, weight_map = sorted(unet), {}
    for i in range(2):
        shard = f"diffusion_pytorch_model-{i + 1:05d}-of-00002.safetensors"
        part = {name: unet[name] for name in names[i::2]}
        safetensors.numpy.save_file(part, folder / "unet" / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (folder / UNET_FILE).unlink()
    index = folder / f"{UNET_FILE}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    model_index = safetensors_io.read_json(folder / "model_index.json")
    model_index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(model_index))
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")
    (folder / "safety_checker" / "model.safetensors").write_bytes(b"its own weights")
    return folder


@pytest.fixture(scope="module")
def whole(published, tmp_path_factory):
    """The published folder as an Orbax checkpoint."""
    out = tmp_path_factory.mktemp("whole") / "checkpoint"
    assert convert.main(["from-diffusers", f"--model={published}", f"--out={out}"]) == 0
    return out


def test_there_and_back_every_file_is_the_same(published, whole, tmp_path):
    out = tmp_path / "out"
    convert.main(["to-diffusers", f"--checkpoint={whole}", f"--out={out}"])
    # but that a text encoder in half precision is to be loaded as the UNet is
    name = "text_encoder/config.json"
    label = {"torch_dtype": "float32"}
    config = safetensors_io.read_json(published / name)
    assert safetensors_io.read_json(out / name) == config | label
    shutil.copyfile(published / name, out / name)
    same_files(published, out)


def test_orbax_alone_reads_the_checkpoint(published, whole):
    with ocp.StandardCheckpointer() as checkpointer:
        unet = checkpointer.restore(whole / "unet")
    ours = stable_diffusion.load(published).params["unet"]
    jax.tree.map(np.testing.assert_array_equal, unet, ours)


@pytest.mark.parametrize("at", ["from-diffusers", "to-diffusers"])
def test_a_dtype_is_cast_to_in_either_direction(published, whole, tmp_path, at):
    """And a text encoder is loaded in the dtype that the UNet is loaded in."""
    if at == "from-diffusers":
        whole = tmp_path / "half"
        flags = [f"--model={published}", f"--out={whole}", "--dtype=bf16"]
        convert.main(["from-diffusers", *flags])
    flags = [f"--checkpoint={whole}", f"--out={tmp_path / 'out'}"]
    flags += ["--dtype=bf16"] if at == "to-diffusers" else []
    convert.main(["to-diffusers", *flags])
    dtypes = {}
    for component in weights.COMPONENTS:
        for file in (tmp_path / "out" / component).glob("*.safetensors"):
            dtypes |= {k: e.dtype for k, e in safetensors_io.read_header(file).items()}
    assert dtypes.pop("text_model.embeddings.position_ids") == "I64"
    assert set(dtypes.values()) == {"BF16"}
    config = safetensors_io.read_json(tmp_path / "out" / "text_encoder/config.json")
    assert config["torch_dtype"] == "float32"
    stable_diffusion.load(tmp_path / "out")


RUNS = ("immunized", "lora_run", "dreambooth_run", "inversion_run")


@pytest.mark.parametrize("which", RUNS)
def test_a_runs_checkpoint_becomes_its_export(request, which, tmp_path):
    run, out = request.getfixturevalue(which), tmp_path / "out"
    convert.main(
        ["to-diffusers", f"--checkpoint={run / 'checkpoints'}", f"--out={out}"]
    )
    same_files(run / "export", out)


@pytest.mark.parametrize("which", ["dreambooth_run", "inversion_run"])
def test_unet_state_of_a_run_that_trained_text_is_refused(request, which, tmp_path):
    run, out = request.getfixturevalue(which), tmp_path / "x.safetensors"
    flags = ("--checkpoint", run / "checkpoints", "--out", out)
    refuse(
        "this run changed the text encoder; .*use to-diffusers", "to-unet-state", *flags
    )
    assert not out.exists()


def test_an_earlier_step_can_be_asked_for(immunized, tiny_folder, tmp_path):
    flags = [f"--checkpoint={immunized / 'checkpoints'}"]
    convert.main(["to-diffusers", *flags, "--step=1", f"--out={tmp_path / 'one'}"])
    one, two, base = (
        (folder / UNET_FILE).read_bytes()
        for folder in (tmp_path / "one", immunized / "export", tiny_folder)
    )
    assert len({one, two, base}) == 3
    assert "After step 1, of" in (tmp_path / "one" / "README.md").read_text()


def test_unet_state_holds_what_changed_and_nothing_else(
    immunized, tiny_folder, tmp_path
):
    out = tmp_path / "changed.safetensors"
    flags = [f"--checkpoint={immunized / 'checkpoints'}", f"--out={out}"]
    convert.main(["to-unet-state", *flags])
    changed = safetensors.numpy.load_file(out)
    base = safetensors.numpy.load_file(tiny_folder / UNET_FILE)
    after = safetensors.numpy.load_file(immunized / "export" / UNET_FILE)
    differ = {k for k in base if base[k].tobytes() != after[k].tobytes()}
    assert differ and changed.keys() == differ
    for name, array in changed.items():
        np.testing.assert_array_equal(array, after[name])
    assert safetensors_io.read_metadata(out)["base_sha256"] == weights.content_hash(
        tiny_folder
    )


def test_pytorch_patches_a_model_with_a_unet_state(immunized, tiny_folder, tmp_path):
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel

    out = tmp_path / "changed.safetensors"
    flags = [f"--checkpoint={immunized / 'checkpoints'}", f"--out={out}"]
    convert.main(["to-unet-state", *flags])
    patched = UNet2DConditionModel.from_pretrained(tiny_folder / "unet")
    state = {k: torch.tensor(v) for k, v in safetensors.numpy.load_file(out).items()}
    assert not patched.load_state_dict(state, strict=False).unexpected_keys
    expected = UNet2DConditionModel.from_pretrained(immunized / "export" / "unet")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, patched.state_dict()[name]), name


def test_pytorch_finds_no_key_missing_or_unexpected(request):
    pytest.importorskip("torch")
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    classes = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
    }
    for run in map(request.getfixturevalue, RUNS):
        for component, cls in classes.items():
            folder = run / "export" / component
            _, info = cls.from_pretrained(folder, output_loading_info=True)
            wrong = ("missing_keys", "unexpected_keys", "mismatched_keys")
            assert not any(info[key] for key in wrong), (folder, info)


def test_a_run_is_converted_without_its_data(lora_run, tmp_path):
    run = shutil.copytree(lora_run, tmp_path / "run")
    settings = safetensors_io.read_json(run / "config.json")
    assert settings["data"]["folder"]
    settings["data"]["folder"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(settings))
    out = tmp_path / "out"
    convert.main(
        ["to-diffusers", f"--checkpoint={run / 'checkpoints'}", f"--out={out}"]
    )
    same_tensors = (folder / UNET_FILE for folder in (lora_run / "export", out))
    assert len({file.read_bytes() for file in same_tensors}) == 1


# --- mistakes -------------------------------------------------------------------------


def refuse(message, *argv):
    with pytest.raises(UserError, match=message) as caught:
        convert.main([str(a) for a in argv])
    assert "\n" not in str(caught.value)


def test_a_base_that_changed_or_moved_is_named(immunized, tiny_folder, tmp_path):
    moved = shutil.copytree(tiny_folder, tmp_path / "moved")
    run = shutil.copytree(immunized, tmp_path / "run")
    settings = safetensors_io.read_json(run / "config.json")
    settings["model"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(settings))
    flags = ["--checkpoint", run / "checkpoints", "--out", tmp_path / "out"]
    refuse("gone' is no model folder here; name it with --base", "to-diffusers", *flags)
    convert.main(["to-diffusers", *map(str, flags), f"--base={moved}"])
    (tmp_path / "out" / "README.md").write_bytes(  # which names the model
        (immunized / "export" / "README.md").read_bytes()
    )
    same_files(immunized / "export", tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    (moved / "unet" / "config.json").write_text("{}")
    refuse("is not what the run started from", "to-diffusers", *flags, "--base", moved)
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_line(immunized, whole, tiny_folder, tmp_path):
    run, out = immunized / "checkpoints", tmp_path / "out"
    to = ("to-diffusers", "--out", out, "--checkpoint")
    state = ("to-unet-state", "--checkpoint", run, "--out")
    refuse("no such folder", *to, tmp_path / "nowhere")
    refuse("neither a whole-model checkpoint", *to, tiny_folder)
    refuse("has no step 7; steps there: 1, 2", *to, run, "--step", 7)
    refuse("--step is for a run's checkpoints", *to, whole, "--step", 1)
    refuse("--out=.* exists", "to-diffusers", "--checkpoint", run, "--out", tiny_folder)
    refuse("must end in .safetensors", *state, tmp_path / "x.bin")
    new = ("--out", tmp_path / "x.safetensors")
    refuse("is a whole model, of which", "to-unet-state", "--checkpoint", whole, *new)
    refuse("no such folder", "from-diffusers", "--model", "nowhere", "--out", out)
    refuse("invalid choice", *to, run, "--dtype", "fp8")
    refuse("required", "to-diffusers")
    refuse("required: FILE", "from-single-file", "--out", out)
    refuse(
        "has 32 channels; must be a multiple of 64, the channels of a head",
        "to-single-file",
        "--model",
        tiny_folder,
        *new,
    )
    assert not out.exists()


def test_a_damaged_whole_checkpoint_is_one_line(whole, tmp_path):
    damaged = shutil.copytree(whole, tmp_path / "damaged")
    flags = ("to-diffusers", "--checkpoint", damaged, "--out", tmp_path / "out")
    shutil.rmtree(damaged / "vae")
    refuse("vae: no such folder; the checkpoint is incomplete", *flags)
    (damaged / "layout.json").write_text('{"format": 2}')
    refuse("format=2; this version reads format 1", *flags)
    (damaged / "layout.json").write_text("{")
    refuse("layout.json: not valid JSON", *flags)
    assert not (tmp_path / "out").exists()
