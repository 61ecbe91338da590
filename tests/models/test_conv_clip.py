# SPDX-License-Identifier: Apache-2.0
"""The convolutional CLIP: saved and loaded, and the pretraining's start of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gift_jax.models import conv_clip, hooks, weights
from gift_jax.pretrain import clip as clip_stage
from gift_jax.runtime.config import load_config

VOCABULARY = 50


@pytest.fixture(scope="module")
def model_config():
    cfg = load_config("configs/emoji_pretrain.py:smoke")
    return clip_stage.model_config(cfg.clip, VOCABULARY)


def test_save_and_load_keep_what_it_computes(model_config, tmp_path, rng):
    clip = hooks.build_clip(model_config)
    assert isinstance(clip, conv_clip.ConvClip)
    params = hooks.init_params(clip, jax.random.key(0))
    weights.save_model_folder(tmp_path / "clip", model_config, params)
    again, loaded, _ = weights.load_component(tmp_path / "clip", "clip")
    x_BCHW = jnp.asarray(rng.uniform(-1, 1, (2, 3, 64, 64)), jnp.float32)
    ids_BL = jnp.asarray([[1, 7, 9, VOCABULARY - 1], [1, 8, VOCABULARY - 1, 0]])
    image = hooks.apply_clip_image(clip, params, x_BCHW)
    text = hooks.apply_clip_text(clip, params, ids_BL)
    assert image.shape == text.shape == (2, model_config["projection_dim"])
    assert np.abs(image[0] - image[1]).max() > 1e-3
    assert np.abs(text[0] - text[1]).max() > 1e-6
    np.testing.assert_array_equal(image, hooks.apply_clip_image(again, loaded, x_BCHW))
    np.testing.assert_array_equal(text, hooks.apply_clip_text(again, loaded, ids_BL))


def test_image_tower_halves_and_keeps_places_apart():
    tower = conv_clip.ImageTower((8, 8, 16))
    x_BHWC = jnp.zeros((1, 64, 64, 3)).at[0, 5, 5].set(1.0)
    params = tower.init(jax.random.key(0), x_BHWC)
    here = tower.apply(params, x_BHWC).pooler_output
    there = tower.apply(params, jnp.roll(x_BHWC, 32, axis=1)).pooler_output
    assert here.shape == (1, 8 * 8 * 16)
    assert np.abs(here - there).max() > 1e-3


def test_training_starts_with_captions_apart(model_config):
    clip = hooks.build_clip(model_config)
    start = clip_stage.init_params(clip, 5, 2, jax.random.key(0))
    assert start["proxies"]["concept"].shape == (5, model_config["projection_dim"])
    assert start["proxies"]["style"].shape == (2, model_config["projection_dim"])
    ids_BL = jnp.asarray([[48, n, 3, 4, 49] for n in range(10, 20)], jnp.int32)

    def mean_cosine(params):
        x_BD = hooks.apply_clip_text(clip, params, ids_BL)
        x_BD = x_BD / jnp.linalg.norm(x_BD, axis=1, keepdims=True)
        return float(jnp.mean(x_BD @ x_BD.T))

    theirs = hooks.init_params(clip, jax.random.key(0))
    assert mean_cosine(theirs) > 0.995
    assert mean_cosine(start["clip"]) < 0.99
