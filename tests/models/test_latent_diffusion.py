# SPDX-License-Identifier: Apache-2.0
"""What the models of every family do alike, where Stable Diffusion's do not show it."""

import json
import shutil

import jax
import numpy as np
import pytest

from gift_jax.models.autoencoder import LatentScale
from gift_jax.models.sd import stable_diffusion
from gift_jax.runtime.errors import UserError

SHIFT = 0.0609


@pytest.fixture(scope="module")
def shifted(tiny):
    return tiny.replace(shift_factor=SHIFT)


def test_shifted_latents_are_those_of_stable_diffusion_3(tiny, shifted, rng):
    images = rng.uniform(-1, 1, size=(2, 16, 16, 3)).astype(np.float32)
    plain, std = tiny.encode_images(images)
    mean, same = shifted.encode_images(images)
    of_vae = np.asarray(plain) / tiny.scaling_factor
    assert np.abs(mean - plain).min() > 0.02
    np.testing.assert_allclose(mean, (of_vae - SHIFT) * tiny.scaling_factor, atol=1e-6)
    np.testing.assert_array_equal(same, std)
    np.testing.assert_allclose(shifted.decode(mean), tiny.decode(plain), atol=1e-5)


def test_pure_decoding_equals_the_batched_one(tiny, shifted, rng):
    z = rng.normal(size=(2, *tiny.latent_shape)).astype(np.float32)
    for model in (tiny, shifted):
        decode = jax.jit(model.autoencoder.decode_scaled)
        images = decode(model.vae_params, model.latent_scale, z)
        np.testing.assert_allclose(images, model.decode(z), atol=1e-5)
    assert np.abs(images - tiny.decode(z)).max() > 1e-2
    assert tiny.autoencoder == shifted.autoencoder  # one program for both


def test_without_a_shift_nothing_is_added(tiny, rng):
    z = rng.normal(size=(3, 4)).astype(np.float32)
    scale = tiny.latent_scale
    assert scale == LatentScale(np.float32(0.5)) and scale.shift is None
    np.testing.assert_array_equal(scale.unscaled(z), z / np.float32(0.5))
    np.testing.assert_array_equal(scale.scaled(z), z * np.float32(0.5))
    both = LatentScale(np.float32(1.5), np.float32(SHIFT))
    np.testing.assert_allclose(both.unscaled(both.scaled(z)), z, atol=1e-6)


def test_stable_diffusion_refuses_a_shift(tiny_folder, tmp_path):
    """Its pipelines in PyTorch would ignore it."""
    folder = shutil.copytree(tiny_folder, tmp_path / "sd")
    file = folder / "vae" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"shift_factor": 0}))
    stable_diffusion.load(folder)
    file.write_text(json.dumps(config | {"shift_factor": SHIFT}))
    message = r"vae/config\.json: shift_factor=0\.0609 is not supported; must be None"
    with pytest.raises(UserError, match=message):
        stable_diffusion.load(folder)
    with pytest.raises(UserError, match="^vae/config.json: shift_factor=0.0609"):
        stable_diffusion.abstract_model(stable_diffusion.read_configs(folder))
