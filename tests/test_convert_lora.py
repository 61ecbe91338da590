# SPDX-License-Identifier: Apache-2.0
"""LoRA files merged into a folder, and written by other names."""

import filecmp
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
from command_runs import TEXT_FILE, tensors
from test_convert import published, refuse  # noqa: F401 - a fixture

from gift_jax import convert
from gift_jax.models import safetensors_io
from gift_jax.models.load import load_model
from gift_jax.models.sd.adapters import AdapterFiles

ATTN = "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k"
FC1 = "text_model.encoder.layers.1.mlp.fc1"


def write(path, **modules):
    """A LoRA by kohya's names of rank 2 and alpha 6. modules: name -> (out, in)."""
    rng, arrays = np.random.default_rng(8), {}
    for name, (out, wide) in modules.items():
        arrays[f"{name}.lora_down.weight"] = rng.normal(size=(2, wide))
        arrays[f"{name}.lora_up.weight"] = rng.normal(size=(out, 2))
        arrays[f"{name}.alpha"] = np.array(6)
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    safetensors.numpy.save_file(arrays, path)
    return path, arrays


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """(file, tensors) of two: of one projection, and of that and a layer of text."""
    folder, attn = tmp_path_factory.mktemp("loras"), f"lora_unet_{ATTN}"
    attn, text = (f"lora_{n}".replace(".", "_") for n in (f"unet_{ATTN}", f"te_{FC1}"))
    one = write(folder / "one.safetensors", **{attn: (32, 32)})
    both = {attn: (32, 32), text: (64, 32)}
    return one, write(folder / "both.safetensors", **both)


def weight(folder, name):
    """(its dtype, float32 array) of one tensor, in whatever file it is."""
    for file in folder.glob("*/*.safetensors"):
        if not file.read_bytes().startswith(b"its own"):
            entry = safetensors_io.read_header(file).get(name)
            if entry:
                array = safetensors_io.read_tensor(name, entry).astype(np.float32)
                return entry.dtype, array


def test_merge_changes_the_loras_layers_and_no_other_byte(published, loras, tmp_path):  # noqa: F811
    """In a folder of shards, with a text encoder in half precision."""
    (one, _), (both, arrays) = loras
    out = tmp_path / "out"
    flags = [f"--model={published}", f"--out={out}", f"--lora={both}:0.5"]
    assert convert.main(["merge-lora", *flags, f"--lora={one}"]) == 0
    differ = set()
    for file in published.rglob("*.safetensors"):
        name = file.relative_to(published)
        if filecmp.cmp(file, out / name, shallow=False):
            continue
        old, new = (safetensors_io.read_header(f / name) for f in (published, out))
        assert [e[1:] for e in old.values()] == [e[1:] for e in new.values()]
        differ |= {
            key
            for key in old
            if safetensors_io.read_tensor(key, old[key], only_floats=False).tobytes()
            != safetensors_io.read_tensor(key, new[key], only_floats=False).tobytes()
        }
    assert differ == {f"{ATTN}.weight", f"{FC1}.weight"}
    down, up, down_text, up_text = (
        arrays[name] for name in arrays if name.endswith(".weight")
    )
    dtype, before = weight(published, f"{ATTN}.weight")
    expected = before + 6 / 2 * (0.5 + 1) * up @ down
    assert dtype == "F32" and np.abs(expected - before).max() > 1
    # the other file has the same factors, by the same seed
    np.testing.assert_allclose(weight(out, f"{ATTN}.weight")[1], expected, atol=1e-4)
    dtype, before = weight(published, f"{FC1}.weight")
    expected = before + 6 / 2 * 0.5 * up_text @ down_text
    after = weight(out, f"{FC1}.weight")
    assert dtype == after[0] == "F16" and np.abs(expected - before).max() > 1
    np.testing.assert_array_equal(after[1], expected.astype(np.float16))


def test_merged_model_is_the_one_that_generate_draws_with(tiny_folder, loras, tmp_path):
    files = tuple(f"{file}:0.5" for file, _ in loras)
    out = tmp_path / "out"
    flags = [f"--model={tiny_folder}", f"--out={out}"]
    convert.main(["merge-lora", *flags, *(f"--lora={file}" for file in files)])
    merged = load_model(str(out)).params
    drawn_with = load_model(str(tiny_folder), added=AdapterFiles(lora=files)).params
    jax.tree.map(np.testing.assert_array_equal, merged, drawn_with)
    plain = tensors(tiny_folder, TEXT_FILE)[f"{FC1}.weight"]
    assert np.abs(tensors(out, TEXT_FILE)[f"{FC1}.weight"] - plain).max() > 1
    card = (out / "README.md").read_text()
    assert "the LoRA `one.safetensors`, scale 0.5 (sha256 `" in card
    assert "the LoRA `both.safetensors`, scale 0.5 (sha256 `" in card
    assert f"base_model: {tiny_folder.name}\n" in card
    assert str(tiny_folder.parent) not in card


def test_merge_casts_to_a_dtype(tiny_folder, loras, tmp_path):
    flags = [f"--model={tiny_folder}", f"--out={tmp_path / 'out'}", "--dtype=bf16"]
    convert.main(["merge-lora", *flags, f"--lora={loras[1][0]}"])
    for name in (f"{ATTN}.weight", f"{FC1}.weight", "conv_in.weight"):
        assert weight(tmp_path / "out", name)[0] == "BF16"


def test_rename_there_and_back(tiny_folder, loras, tmp_path):
    (_, (file, arrays)), model = loras, f"--model={tiny_folder}"
    theirs, back = tmp_path / "theirs.safetensors", tmp_path / "back.safetensors"
    for source, names, out in ((file, "diffusers", theirs), (theirs, "kohya", back)):
        flags = [model, f"--lora={source}", f"--names={names}", f"--out={out}"]
        assert convert.main(["rename-lora", *flags]) == 0
    by_diffusers = safetensors.numpy.load_file(theirs)
    assert by_diffusers.keys() == {
        *(f"unet.{ATTN}.lora_{half}.weight" for half in "AB"),
        f"text_encoder.{FC1}.lora_linear_layer.down.weight",
        f"text_encoder.{FC1}.lora_linear_layer.up.weight",
    }
    up = arrays[f"lora_te_{FC1.replace('.', '_')}.lora_up.weight"]
    renamed_up = by_diffusers[f"text_encoder.{FC1}.lora_linear_layer.up.weight"]
    np.testing.assert_allclose(renamed_up, 3 * up, atol=1e-6)  # alpha / rank
    again = safetensors.numpy.load_file(back)
    assert again.keys() == arrays.keys()
    for name, array in again.items():
        scale = 3 if "lora_up" in name else 1 / 3 if "alpha" in name else 1
        np.testing.assert_allclose(array, scale * arrays[name], atol=1e-6)
    half = tmp_path / "half.safetensors"
    flags = [model, f"--lora={file}", "--names=kohya", f"--out={half}"]
    convert.main(["rename-lora", *flags, "--dtype=fp16"])
    entries = safetensors_io.read_header(half)
    assert {n.rpartition(".")[2]: e.dtype for n, e in entries.items()} == {
        "weight": "F16",
        "alpha": "F32",
    }


def test_mistakes_are_one_line(tiny_folder, loras, tmp_path):
    (one, arrays), out = loras[0], tmp_path / "out"
    merge = ("merge-lora", "--model", tiny_folder, "--out", out)
    refuse("required: --lora", *merge)
    refuse("lora='nowhere': no such file", *merge, "--lora", "nowhere")
    refuse("'x' is no scale", *merge, "--lora", f"{one}:x")
    refuse("model='nowhere': no such folder", *merge, "--lora", one, "--model=nowhere")
    refuse("--out=.* exists", *merge, "--lora", one, "--out", tiny_folder)
    other = {n.replace("up_blocks", "sideways"): a for n, a in arrays.items()}
    safetensors.numpy.save_file(arrays | other, tmp_path / "other.safetensors")
    message = "other.safetensors: lora_unet_sideways_.*; 3 of 6 tensors do not fit"
    refuse(message, *merge, "--lora", one, "--lora", tmp_path / "other.safetensors")
    whole = one.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-8])
    cut = re.escape("cut.safetensors: truncated")
    refuse(cut, *merge, "--lora", tmp_path / "cut.safetensors")
    assert not out.exists()
    rename = ("rename-lora", "--model", tiny_folder, "--lora", one, "--names")
    new = ("--out", tmp_path / "new.safetensors")
    refuse("invalid choice: 'a1111'", *rename, "a1111", *new)
    refuse("must end in .safetensors", *rename, "kohya", "--out", tmp_path / "x.bin")
    refuse("--out=.* exists", *rename, "kohya", "--out", one)
