# SPDX-License-Identifier: Apache-2.0
"""Folders between here and today's diffusers and transformers, in both directions."""

import json
import shutil

import jax
import numpy as np
import pytest
import todays_libraries as today
from flax.traverse_util import flatten_dict
from tiny_model import relative_error

from gift_jax.models import exports, safetensors_io, weights
from gift_jax.models.sd import stable_diffusion
from gift_jax.runtime.errors import UserError
from gift_jax.sampling import sampler

pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")

TEXT_FILE = "text_encoder/model.safetensors"
NORM = "text_model/final_layer_norm/bias"
UNET = "mid_block/attentions_0/transformer_blocks_0/attn2/to_k/kernel"
PROMPT = "a dog"


@pytest.fixture(scope="module")
def saved(tiny_folder, tmp_path_factory):
    """A model as today's classes build and save it."""
    return today.write(tmp_path_factory.mktemp("t") / "sd", tiny_folder / "tokenizer")


@pytest.fixture(scope="module")
def labeled(tiny_folder, tmp_path_factory):
    """A float32 model whose text encoder's config says float16."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("l") / "sd")
    edit(folder / "text_encoder" / "config.json", torch_dtype="float16")
    return folder


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def names(folder):
    return list(safetensors_io.read_header(folder / TEXT_FILE))


def draw(model, latents):
    sample = sampler.make_sampler(model, steps=2, guidance=1.0)
    cond = model.encode_text([PROMPT])
    params = model.params["unet"], model.params["vae"]
    return np.asarray(sample(*params, cond, None, latents))[0].astype(np.float32)


def check_picture(folder, pipe):
    """Asserts that a folder's picture is the pipeline's, to 1 of 255."""
    model = stable_diffusion.load(folder)
    latents = sampler.initial_latents(jax.random.key(0), 1, model.latent_shape)
    theirs = 255 * today.draw(pipe, PROMPT, latents[0], steps=2)
    ours = draw(model, latents)
    assert theirs.shape == ours.shape and theirs.std() > 1
    print(f"{folder.name}: {np.abs(ours - theirs).max():.2f} of 255 apart")
    assert np.abs(ours - theirs).max() <= 1
    return model


def same_params(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def test_a_folder_that_they_built_is_read(saved):
    assert not any(name.startswith("text_model.") for name in names(saved))
    check_picture(saved, today.pipeline(saved))


@pytest.mark.parametrize(
    "base, dtype", [("labeled", "F32"), ("saved", "F16"), ("labeled", "BF16")]
)
def test_an_export_is_drawn_saved_and_read_again(base, dtype, request, tmp_path):
    base = request.getfixturevalue(base)
    changed = {UNET: np.full((32, 64), 0.25, np.float32)}
    changed[NORM] = np.linspace(-1, 1, 32, dtype=np.float32)
    exports.export(base, changed, tmp_path / "export", dtype=dtype)
    assert names(tmp_path / "export") == names(base)
    pipe = today.pipeline(tmp_path / "export")
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert {str(part.dtype) for part in parts} == {"torch.float32"}
    model = check_picture(tmp_path / "export", pipe)
    flat = flatten_dict(model.params["text_encoder"], sep="/")
    assert relative_error(flat[NORM], changed[NORM]) < 1e-2
    again = today.save(pipe, tmp_path / "again", base / "tokenizer")
    same_params(stable_diffusion.load(again), model)


def test_all_of_an_export_is_half_where_that_is_asked_for(saved, tmp_path):
    import torch

    exports.export(saved, {}, tmp_path / "out", dtype="F16")
    pipe = today.pipeline(tmp_path / "out", torch_dtype=torch.float16)
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert {part.dtype for part in parts} == {torch.float16}
    pipe.save_pretrained(str(tmp_path / "half"))
    _, params, _ = weights.load_component(tmp_path / "half" / "unet", "unet")
    _, expected, _ = weights.load_component(tmp_path / "out" / "unet", "unet")
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_nested_text_config_is_read_as_they_read_it(saved, tmp_path):
    base = shutil.copytree(saved, tmp_path / "base")
    file = base / "text_encoder" / "config.json"
    inner = json.loads(file.read_text()) | {"dtype": "float16"}
    nested = {"model_type": "clip", "text_config": inner, "vocab_size": 1}
    file.write_text(json.dumps(nested | {"torch_dtype": "float16"}))
    table = np.full((600, 32), 0.5, np.float32)  # more words
    out = tmp_path / "out"
    exports.export(base, {weights.TOKEN_TABLE: table}, out)
    config = json.loads((out / "text_encoder" / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == 600 and config["vocab_size"] == 1
    assert config["text_config"]["dtype"] == config["torch_dtype"] == "float32"
    pipe = today.pipeline(out)
    assert tuple(pipe.text_encoder.get_input_embeddings().weight.shape) == (600, 32)
    check_picture(out, pipe)


def test_pictures_need_not_be_square(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "sd")
    edit(folder / "unet" / "config.json", sample_size=[8, 12])
    model = check_picture(folder, today.pipeline(folder))
    assert model.latent_shape == (4, 8, 12)
    with pytest.raises(UserError, match="draws 16x24 pixels, .* set config.resolution"):
        _ = model.image_size
    assert stable_diffusion.load(folder, resolution=16).image_size == 16
    edit(folder / "unet" / "config.json", sample_size=[8, 9])
    with pytest.raises(UserError, match=r"sample_size=\(8, 9\); must be a multiple of"):
        stable_diffusion.load(folder)


def test_sizes_of_the_oldest_configs_are_corrected_as_they_correct_them(
    saved, tmp_path
):
    folder = shutil.copytree(saved, tmp_path / "sd")
    for version, side in (("0.8.1", 64), ("0.10.0", 8)):
        edit(folder / "unet" / "config.json", _diffusers_version=version)
        size = today.pipeline(folder).unet.config.sample_size
        assert stable_diffusion.load(folder).latent_shape[1:] == (size, size)
        assert size == side
