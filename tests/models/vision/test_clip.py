# SPDX-License-Identifier: Apache-2.0
"""The two-tower CLIP: as PyTorch computes it, and with a convolutional tower."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import TINY_TEXT, random_params, relative_error

from gift_jax.models import exports, vision, weights
from gift_jax.models.ops.kernels import Kernels
from gift_jax.models.params import init_params
from gift_jax.models.vision.clip import ConvTower
from gift_jax.pretrain import clip as clip_stage
from gift_jax.runtime.config import load_config

VOCABULARY = 50


@pytest.fixture(scope="module")
def model_config():
    cfg = load_config("configs/emoji_pretrain.py:smoke")
    return clip_stage.model_config(cfg.clip, VOCABULARY)


def test_clip_equals_pytorch(tmp_path, rng):
    torch = pytest.importorskip("torch")
    from transformers import CLIPModel

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = {"text_config": TINY_TEXT, "vision_config": tower, "projection_dim": 24}
    clip = vision.build_clip(config)
    params = random_params(clip, 0)
    exports.save_model_folder(tmp_path / "clip", config, params)
    theirs = CLIPModel.from_pretrained(str(tmp_path / "clip"))
    ids = rng.integers(0, 512, size=(2, 16)).astype(np.int32)
    ids[:, 7:] = 513
    x = rng.normal(size=(2, 3, 16, 16)).astype(np.float32)
    with torch.no_grad():
        out = theirs(torch.tensor(ids, dtype=torch.long), torch.tensor(x))
    ours = vision.apply_clip_text(clip, params, ids)
    ours /= np.linalg.norm(ours, axis=-1, keepdims=True)
    assert relative_error(ours, out.text_embeds.numpy()) < 1e-5
    for conv in ("matmul", "xla"):
        clip = clip.clone(kernels=Kernels(conv=conv))
        ours = vision.apply_clip_image(clip, params, x)
        ours /= np.linalg.norm(ours, axis=-1, keepdims=True)
        assert relative_error(ours, out.image_embeds.numpy()) < 1e-5
    _, loaded, _ = weights.load_component(tmp_path / "clip", "clip")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_save_and_load_keep_what_it_computes(model_config, tmp_path, rng):
    clip = vision.build_clip(model_config)
    params = init_params(clip, jax.random.key(0))
    exports.save_model_folder(tmp_path / "clip", model_config, params)
    again, loaded, _ = weights.load_component(tmp_path / "clip", "clip")
    x_BCHW = jnp.asarray(rng.uniform(-1, 1, (2, 3, 64, 64)), jnp.float32)
    ids_BL = jnp.asarray([[1, 7, 9, VOCABULARY - 1], [1, 8, VOCABULARY - 1, 0]])
    image_of = jax.jit(vision.apply_clip_image, static_argnums=0)
    text_of = jax.jit(vision.apply_clip_text, static_argnums=0)
    image, text = image_of(clip, params, x_BCHW), text_of(clip, params, ids_BL)
    assert image.shape == text.shape == (2, model_config["projection_dim"])
    assert np.abs(image[0] - image[1]).max() > 1e-3
    assert np.abs(text[0] - text[1]).max() > 1e-6
    np.testing.assert_array_equal(image, image_of(again, loaded, x_BCHW))
    np.testing.assert_array_equal(text, text_of(again, loaded, ids_BL))


def test_image_tower_halves_and_keeps_places_apart():
    tower = ConvTower((8, 8, 16))
    x_BHWC = jnp.zeros((1, 64, 64, 3)).at[0, 5, 5].set(1.0)
    params = tower.init(jax.random.key(0), x_BHWC)
    here = tower.apply(params, x_BHWC)
    there = tower.apply(params, jnp.roll(x_BHWC, 32, axis=1))
    assert here.shape == (1, 8 * 8 * 16)
    assert np.abs(here - there).max() > 1e-3


def test_training_starts_with_captions_apart(model_config):
    clip = vision.build_clip(model_config)
    start = clip_stage.init_params(clip, 5, 2, jax.random.key(0))
    assert start["proxies"]["concept"].shape == (5, model_config["projection_dim"])
    assert start["proxies"]["style"].shape == (2, model_config["projection_dim"])
    ids_BL = jnp.asarray([[48, n, 3, 4, 49] for n in range(10, 20)], jnp.int32)

    def mean_cosine(params):
        x_BD = vision.apply_clip_text(clip, params, ids_BL)
        x_BD = x_BD / jnp.linalg.norm(x_BD, axis=1, keepdims=True)
        return float(jnp.mean(x_BD @ x_BD.T))

    theirs = init_params(clip, jax.random.key(0))
    assert mean_cosine(theirs) > 0.995
    assert mean_cosine(start["clip"]) < 0.99
