# SPDX-License-Identifier: Apache-2.0
"""Models that PyTorch loads and draws alike, and what is found where it does not."""

import dataclasses
import importlib.util
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from command_runs import TEXT_FILE, UNET_FILE, tensors

from gift_jax import convert
from gift_jax.models import exports, load
from gift_jax.models.sd import pytorch
from gift_jax.runtime.errors import UserError, VerificationError
from gift_jax.sampling import verification
from gift_jax.training import setup

needs_torch = pytest.mark.skipif(
    not pytorch.is_installed(), reason="PyTorch is not installed"
)
CONV = "conv_in.weight"
ATTN = "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
FC1 = "text_model.encoder.layers.0.mlp.fc1"


@pytest.fixture
def verify(capsys):
    """(flags) -> the one line that is printed."""

    def call(model, *flags):
        capsys.readouterr()
        argv = ["verify", f"--model={model}", *map(str, flags)]
        assert convert.main(argv) == 0
        out, err = capsys.readouterr()
        assert out.count("\n") == 1 and not err, (out, err)
        return out.strip()

    return call


def fails(message, model, *flags):
    with pytest.raises(VerificationError, match=message) as caught:
        convert.main(["verify", f"--model={model}", *map(str, flags)])
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1


@pytest.fixture
def changed_copy(tiny_folder, tmp_path):
    """(a file, a change of its tensors in place) -> a copy of the tiny model."""

    def call(name, change):
        folder = shutil.copytree(tiny_folder, tmp_path / "sd")
        arrays = tensors(folder, name)
        change(arrays)
        safetensors.numpy.save_file(arrays, folder / name, {"format": "pt"})
        return folder

    return call


def lora(file, rename, *modules, alpha=None):
    """A LoRA of rank 2 of modules: (component, name, shape of the weight)."""
    rng, arrays = np.random.default_rng(3), {}
    for component, name, (out, wide) in modules:
        start, halves = rename(component, name)
        arrays[f"{start}.{halves[0]}.weight"] = rng.normal(size=(2, wide))
        arrays[f"{start}.{halves[1]}.weight"] = rng.normal(size=(out, 2))
        if alpha:
            arrays[f"{start}.alpha"] = np.asarray(alpha)
    arrays = {name: a.astype(np.float32) for name, a in arrays.items()}
    safetensors.numpy.save_file(arrays, file, {"format": "pt"})
    return file


def by_diffusers(component, name):
    halves = ("lora_A", "lora_B")
    if component != "unet":
        halves = ("lora_linear_layer.down", "lora_linear_layer.up")
    return f"{component}.{name}", halves


def by_kohya(component, name):
    start = {"unet": "unet", "text_encoder": "te", "text_encoder_2": "te2"}[component]
    return f"lora_{start}_{name.replace('.', '_')}", ("lora_down", "lora_up")


def modules_of(folder):
    """A layer of the UNet and one of the last text encoder, see `lora`."""
    encoder = sorted(path.name for path in folder.glob("text_encoder*"))[-1]
    shapes = {**tensors(folder), **tensors(folder, f"{encoder}/model.safetensors")}
    return [
        (component, name, shapes[f"{name}.weight"].shape)
        for component, name in (("unet", ATTN), (encoder, FC1))
    ]


# --- what agrees ----------------------------------------------------------------------

AGREE = r"verified: {} load in diffusers \S+, transformers \S+; "
AGREE += "pictures differ by at most [01]/255"


@needs_torch
@pytest.mark.parametrize("name, count", [("tiny_folder", 3), ("tiny_xl_folder", 4)])
def test_exports_agree(verify, request, tmp_path, name, count):
    base = request.getfixturevalue(name)
    exports.export(base, {}, tmp_path / "export", dtype="F16")
    line = verify(tmp_path / "export")
    assert re.fullmatch(AGREE.format(f"{count} components"), line), line


@needs_torch
@pytest.mark.parametrize("base, count", [("tiny_folder", 3), ("tiny_xl_folder", 4)])
def test_added_files_agree(verify, request, tmp_path, base, count):
    """LoRA by both kinds of names, one of them scaled, and learned embeddings."""
    folder = request.getfixturevalue(base)
    modules = modules_of(folder)
    widths = {"<new>": 32} if count == 3 else {"clip_l": 32, "clip_g": 48}
    rng = np.random.default_rng(4)
    arrays = {n: rng.normal(size=(2, w)).astype(np.float32) for n, w in widths.items()}
    one = lora(tmp_path / "one.safetensors", by_diffusers, *modules)
    two = lora(tmp_path / "two.safetensors", by_kohya, *modules, alpha=4)
    safetensors.numpy.save_file(arrays, tmp_path / "new.safetensors")
    words = f"--textual-inversion={tmp_path / 'new.safetensors'}"
    line = verify(folder, f"--lora={one}", f"--lora={two}:-0.5", words)
    parts = rf"{count} components and 2 \+ 2 LoRA layers and 2 vectors of"
    assert re.fullmatch(AGREE.format(f"{parts} <new>"), line), line


@needs_torch
def test_a_scheduler_that_draws_noise_gives_way_to_ddim(verify, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "sd")
    file = folder / "model_index.json"
    name = "EulerAncestralDiscreteScheduler"
    index = json.loads(file.read_text()) | {"scheduler": ["diffusers", name]}
    file.write_text(json.dumps(index))
    assert "pictures differ by at most" in verify(folder, "--prompt=a", "--steps=2")


# --- what does not --------------------------------------------------------------------


@needs_torch
def test_tensors_that_are_missing_or_unexpected(changed_copy, tmp_path):
    fails("conv_in.weight", changed_copy(UNET_FILE, lambda a: a.pop(CONV)))
    shutil.rmtree(tmp_path / "sd")
    folder = changed_copy(TEXT_FILE, lambda a: a.update(extra=np.ones(3, np.float32)))
    fails("1 unexpected tensors, e.g. extra", folder)


@needs_torch
def test_a_text_encoder_that_loads_in_another_dtype(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "sd")
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float16"}))
    fails("loads text_encoder in float16, but the unet in float32, which", folder)


@needs_torch
def test_a_tensor_that_is_read_otherwise(tiny_folder, monkeypatch):
    """Here, as where a reader has two layouts mixed up."""
    read = pytorch.safetensors_io.read_tensor

    def turned(name, entry):
        array = read(name, entry)
        return array[::-1] if name == CONV else array

    monkeypatch.setattr(pytorch.safetensors_io, "read_tensor", turned)
    fails(r"conv_in.weight is \[32, 4, 3, 3\] of other values", tiny_folder)


@needs_torch
def test_pictures_that_differ(tiny_folder, monkeypatch):
    own = load.load_model

    def brighter(*args, **how):
        model = own(*args, **how)
        return model.replace(scaling_factor=model.scaling_factor * 0.5)

    monkeypatch.setattr(load, "load_model", brighter)
    fails(r"the pictures of gift_jax and PyTorch differ by \d+/255", tiny_folder)


@needs_torch
def test_lora_that_diffusers_drops_in_part(verify, tiny_folder, tmp_path):
    """By names of transformers alone, beside others that say of what they are."""

    def rename(component, name):
        start, halves = by_diffusers(component, name)
        return start.removeprefix("text_encoder."), halves

    file = lora(tmp_path / "a.safetensors", rename, *modules_of(tiny_folder))
    message = f"drops the tensors of 1 of 2 layers, e.g. {re.escape(FC1)}.lora_linear"
    fails(message, tiny_folder, f"--lora={file}", "--no-picture")
    renamed = tmp_path / "renamed.safetensors"
    argv = ["rename-lora", f"--model={tiny_folder}", f"--lora={file}"]
    assert convert.main([*argv, "--names=diffusers", f"--out={renamed}"]) == 0
    assert "and 2 LoRA" in verify(tiny_folder, f"--lora={renamed}", "--no-picture")


@needs_torch
def test_lora_that_diffusers_scales_otherwise(tiny_folder, tmp_path):
    """To the attention layers it gives the alpha that most of them have."""
    names = ATTN, ATTN.replace("to_k", "to_v"), ATTN.replace("to_k", "to_q")
    modules = [("unet", name, (32, 32)) for name in names]
    file = lora(tmp_path / "a.safetensors", by_kohya, *modules, alpha=2)
    arrays = safetensors.numpy.load_file(file)
    arrays[f"{by_kohya(*modules[0][:2])[0]}.alpha"] = np.asarray(8, np.float32)
    safetensors.numpy.save_file(arrays, file)
    message = f"update of unet.{re.escape(ATTN)} is .* do its layers differ in alpha"
    fails(message, tiny_folder, f"--lora={file}", "--no-picture")


@needs_torch
def test_vectors_that_do_not_arrive(tiny_folder, tmp_path, monkeypatch):
    """As where the tokenizer gives both of a token's names the same vector."""
    monkeypatch.setattr(pytorch, "vector_names", lambda token, count: [token] * count)
    array = np.float32([[1] * 32, [2] * 32])
    file = tmp_path / "new.safetensors"
    safetensors.numpy.save_file({"<new>": array}, file)
    flags = f"--textual-inversion={file}", "--no-picture"
    fails("diffusers reads other vectors of '<new>' than the 2", tiny_folder, *flags)


# --- mistakes -------------------------------------------------------------------------


def without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert importlib.util.find_spec("torch") is None


def refuse(message, *argv):
    with pytest.raises(UserError, match=message) as caught:
        convert.main(["verify", *map(str, argv)])
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_without_pytorch_it_says_what_to_install(tiny_folder, monkeypatch):
    without_torch(monkeypatch)
    refuse(
        r"torch is not installed; pip install -U '\.\[torch\]' in a clone",
        "--model",
        "a",
    )


def test_pytorch_is_not_imported_before_it_is_needed():
    text = (
        "import gift_jax.convert, sys; print({'torch', 'diffusers'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@needs_torch
def test_mistakes_are_one_line(tiny_folder):
    refuse("no such folder", "--model=nowhere")
    refuse("required: --model")
    refuse("--steps=0 must be", "--model", tiny_folder, "--steps=0")
    refuse("no such file", "--model", tiny_folder, "--lora=nowhere")
    refuse("no such file", "--model", tiny_folder, "--textual-inversion=nowhere")
    refuse("'x' is no scale", "--model", tiny_folder, "--lora=a:x")


# --- at the end of a run: see test_train and test_attack, too -------------------------


@pytest.fixture
def a_run(tiny_folder):
    return setup.Run(model=str(tiny_folder))


@pytest.fixture
def calls(monkeypatch):
    """The arguments of `verify`, which does nothing."""
    made = []

    def call(*args, **how):
        made.append((args, how))
        return "verified"

    monkeypatch.setattr(verification, "verify", call)
    return made


@needs_torch
@pytest.mark.parametrize("choice", ["auto", "on"])
def test_a_failure_is_a_warning_or_an_error(a_run, changed_copy, choice, caplog):
    run = dataclasses.replace(a_run, verify=choice)
    folder = changed_copy(UNET_FILE, lambda a: a.pop(CONV))
    if choice == "on":
        with pytest.raises(VerificationError, match="conv_in"):
            verification.verify_run(run, folder)
    else:
        verification.verify_run(run, folder)
        assert re.search("NOT VERIFIED, .*conv_in", caplog.text)


def test_without_pytorch_a_run_is_as_before(a_run, tmp_path, calls, monkeypatch):
    without_torch(monkeypatch)
    for choice in ("auto", "off"):
        verification.check_field(choice)
        run = dataclasses.replace(a_run, verify=choice)
        verification.verify_run(run, tmp_path)
    assert not calls
    with pytest.raises(UserError, match="config.verify=on needs PyTorch, and torch is"):
        verification.check_field("on")


@needs_torch
def test_large_models_are_drawn_only_if_asked_for(
    a_run, tiny_folder, calls, monkeypatch
):
    for choice, limit, is_drawn in (
        ("auto", load.SMALL_BYTES, True),
        ("auto", 1000, False),
        ("on", 1000, True),
    ):
        monkeypatch.setattr(load, "SMALL_BYTES", limit)
        run = dataclasses.replace(a_run, verify=choice)
        verification.verify_run(run, tiny_folder)
        assert bool(calls.pop()[1]["picture"]) == is_drawn
    run = dataclasses.replace(a_run, verify="off")
    verification.verify_run(run, tiny_folder)
    assert not calls
