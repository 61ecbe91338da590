# SPDX-License-Identifier: Apache-2.0
"""The Flax models against PyTorch's, and the layers that replace Flax's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gift_jax.models import hooks, weights

TOLERANCE = 1e-5


def relative_error(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def unet_inputs(rng, batch=2):
    z = rng.normal(size=(batch, 4, 8, 8)).astype(np.float32)
    t = np.asarray([3, 987][:batch], np.int32)
    c = rng.normal(size=(batch, 16, 32)).astype(np.float32)
    return z, t, c


def test_unet_equals_pytorch(tiny, tiny_folder, rng):
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel

    z, t, c = unet_inputs(rng)
    theirs = UNet2DConditionModel.from_pretrained(str(tiny_folder / "unet"))
    with torch.no_grad():
        expected = theirs(torch.tensor(z), torch.tensor(t), torch.tensor(c)).sample
    params = tiny.params["unet"]
    ours, _ = jax.jit(lambda p: hooks.apply_unet(tiny.unet, p, z, t, c))(params)
    stock = tiny.unet.apply({"params": params}, z, jnp.asarray(t), c).sample
    assert relative_error(stock, expected.numpy()) > TOLERANCE  # or nothing is corrected
    assert relative_error(ours, expected.numpy()) < TOLERANCE


def test_vae_equals_pytorch(tiny, tiny_folder, rng):
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL

    x = rng.uniform(-1, 1, size=(2, 3, 16, 16)).astype(np.float32)
    theirs = AutoencoderKL.from_pretrained(str(tiny_folder / "vae"))
    with torch.no_grad():
        posterior = theirs.encode(torch.tensor(x)).latent_dist
        image = theirs.decode(posterior.mean).sample
    params = tiny.params["vae"]
    mean, logvar = jax.jit(lambda p: hooks.apply_vae_encode(tiny.vae, p, x))(params)
    z = posterior.mean.numpy()
    decoded = jax.jit(lambda p: hooks.apply_vae_decode(tiny.vae, p, z))(params)
    assert relative_error(mean, posterior.mean.numpy()) < TOLERANCE
    assert relative_error(logvar, posterior.logvar.numpy()) < TOLERANCE
    assert relative_error(decoded, image.numpy()) < TOLERANCE


def test_text_equals_pytorch(tiny, tiny_folder, rng):
    torch = pytest.importorskip("torch")
    from transformers import CLIPTextModel

    ids = rng.integers(0, 512, size=(3, 16)).astype(np.int32)
    ids[:, 0], ids[0, 5:], ids[1, 9:], ids[2, 15:] = 512, 513, 513, 513
    theirs = CLIPTextModel.from_pretrained(str(tiny_folder / "text_encoder"))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids, dtype=torch.long))
    hidden, pooled = hooks.apply_text(
        tiny.text_encoder, tiny.params["text_encoder"], ids
    )
    assert relative_error(hidden, expected.last_hidden_state.numpy()) < TOLERANCE
    assert relative_error(pooled, expected.pooler_output.numpy()) < TOLERANCE
