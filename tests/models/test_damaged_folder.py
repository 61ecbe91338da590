# SPDX-License-Identifier: Apache-2.0
"""Any file of a model folder, damaged in any way: one line that names it."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from properties import DAMAGES, damaged, outcome

from gift_jax.models import folder, kinds, safetensors_io, weight_files, weights
from gift_jax.models.load import load_model
from gift_jax.models.sd import stable_diffusion

WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
CONFIGS = {kind: f"{kind}/config.json" for kind in WEIGHTS}


def read(root, kind):
    """Reads the part of a folder that a kind of component is in, "" for the index."""
    if kind:
        return weights.load_component(root / kind, kind)
    return folder.class_names(root), folder.pipeline(root)


@pytest.mark.parametrize("kind", ["", *WEIGHTS])
def test_a_damaged_file_is_named_with_the_remedy(tiny_folder, tmp_path, kind):
    names = [CONFIGS[kind], WEIGHTS[kind]] if kind else ["model_index.json"]
    for name in names:
        for damage, (_, words) in DAMAGES.items():
            copy = damaged(tiny_folder, name, damage, tmp_path / "copy")
            result, message = outcome(lambda copy=copy: read(copy, kind))
            assert result is None, (name, damage)
            where = name
            if damage == "missing" and name.endswith(".safetensors"):
                where, words = os.path.dirname(name), "no " + os.path.basename(name)
            assert where in message and words in message, (name, damage, message)
            if damage == "conflict" and name.endswith(".json"):
                assert "marks of a merge conflict in line 1" in message


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_config_cut_anywhere_is_one_line(tiny_folder, tmp_path, kind):
    text = (tiny_folder / CONFIGS[kind]).read_text().rstrip()
    file = tmp_path / "config.json"
    for end in range(len(text)):
        file.write_text(text[:end])
        assert outcome(lambda: kinds.read_config(tmp_path, kind))[0] is None


@pytest.mark.parametrize("value", [None, 1, "x", True, [1, 2], ["a"], {}, [None, "x"]])
def test_a_component_of_the_index_is_of_two_names(tiny_folder, tmp_path, value):
    index = json.loads((tiny_folder / "model_index.json").read_text())
    for name in ("unet", "tokenizer_2"):
        file = tmp_path / "model_index.json"
        file.write_text(json.dumps(index | {name: value}))
        result, message = outcome(lambda: stable_diffusion.load(tmp_path))
        assert (result is None and name in message) or "config.json" in message


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"_class_name": "PixArtSigmaPipeline"}, "_class_name='PixArtSigmaPipeline'"),
        ({"_class_name": "StableDiffusion3Pipeline"}, "transformer is None"),
        ({"_class_name": "StableDiffusionXLPipeline"}, "text_encoder_2 is None"),
        ({"_class_name": ["pipeline", "Own"]}, "must be the name of a pipeline"),
        ({"text_encoder_2": ["transformers", "CLIPTextModel"]}, "'text_encoder_2'"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "'controlnet'"),
    ],
)
def test_models_of_other_families_are_refused_by_name(
    tiny_folder, tmp_path, changes, words
):
    index = json.loads((tiny_folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | changes))
    assert words in outcome(lambda: load_model(str(tmp_path)))[1]


def test_names_of_a_compiled_model_are_recognized(tiny_folder, tmp_path):
    copy = damaged(tiny_folder, WEIGHTS["unet"], "missing", tmp_path / "copy")
    tensors = safetensors.numpy.load_file(tiny_folder / WEIGHTS["unet"])
    for prefix, words in (("_orig_mod.", "torch.compile"), ("module.", "parallel")):
        named = {prefix + name: array for name, array in tensors.items()}
        safetensors.numpy.save_file(named, copy / WEIGHTS["unet"])
        assert words in outcome(lambda: read(copy, "unet"))[1]


def test_one_file_beside_shards_is_refused(tiny_folder, tmp_path):
    copy = damaged(tiny_folder, "unet/config.json", "twice", tmp_path / "copy")
    index = copy / (WEIGHTS["unet"] + ".index.json")
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
    with pytest.raises(ValueError, match="has both .* libraries read one or the other"):
        weight_files.weight_files(copy / "unet", "diffusion_pytorch_model")


def test_plain_files_are_read_beside_any_number_of_variants(tiny_folder, tmp_path):
    stem = "diffusion_pytorch_model"
    for name in ("", ".fp16", ".non_ema"):
        safetensors.numpy.save_file(
            {"a": np.zeros(1)}, tmp_path / f"{stem}{name}.safetensors"
        )
    (file,) = weight_files.weight_files(tmp_path, stem)
    assert file.name == f"{stem}.safetensors"


def test_a_pickle_is_told_what_to_do(tmp_path):
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"x")
    message = outcome(lambda: load_model(str(file)))[1]
    assert "from_single_file(FILE).save_pretrained(FOLDER)" in message


def test_float8_is_refused_with_the_remedy(tiny_folder, tmp_path):
    file, dtype, table = WEIGHTS["vae"], ml_dtypes.float8_e4m3fn, {}
    for name, entry in safetensors_io.read_header(tiny_folder / file).items():
        array = safetensors_io.read_tensor(name, entry).astype(dtype)
        table[name] = "F8_E4M3", entry.shape, lambda array=array: array
    copy = damaged(tiny_folder, file, "missing", tmp_path / "copy")
    safetensors_io.write_file(copy / file, table)
    message = outcome(lambda: read(copy, "vae"))[1]
    assert "has dtype F8_E4M3" in message and "save_pretrained" in message
