# SPDX-License-Identifier: Apache-2.0
"""The diffusion loss of cached pairs."""

import jax
import numpy as np
import pytest
import toy_denoiser

from gift_jax.diffusion import normal_like, timesteps
from gift_jax.models.trainable import merge_params

KEY = jax.random.key(3)


@pytest.fixture
def unet():
    return merge_params(toy_denoiser.params(), {})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_loss_equals_numpy(unet, rng, kind):
    denoiser = toy_denoiser.denoiser(kind)
    abar_T, batch = toy_denoiser.abar(), toy_denoiser.batch(3)
    z, t = np.asarray(batch["mean"]), np.asarray([0, 4, 9])
    eps = rng.normal(size=z.shape).astype(np.float32)
    loss, _ = denoiser.losses_at(unet, abar_T, z, t, eps, batch["text"])
    a = np.asarray(abar_T)[t].reshape(3, 1, 1, 1)
    z_t = np.sqrt(a) * z + np.sqrt(1 - a) * eps
    wanted = eps if kind == "epsilon" else np.sqrt(a) * eps - np.sqrt(1 - a) * z
    out, _ = toy_denoiser.predict(unet, z_t, t, batch["text"])
    expected = np.square(np.asarray(out) - wanted).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_each_example_has_noise_and_timestep_of_its_own(unet):
    one = toy_denoiser.batch(1)
    batch = jax.tree.map(lambda a: np.repeat(a, 8, axis=0), one)
    loss, _ = jax.jit(toy_denoiser.denoiser().losses)(
        unet, toy_denoiser.abar(), batch, KEY
    )
    assert len(np.unique(loss)) == 8


def test_loss_of_an_example_does_not_depend_on_the_rest_of_the_batch(unet):
    denoiser, abar_T = toy_denoiser.denoiser(), toy_denoiser.abar()
    batch = toy_denoiser.batch(4)
    loss = jax.jit(denoiser.losses)
    whole, _ = loss(unet, abar_T, batch, KEY)
    part, _ = loss(unet, abar_T, jax.tree.map(lambda a: a[:2], batch), KEY)
    np.testing.assert_allclose(part, whole[:2], rtol=1e-5)


def test_latents_are_drawn_from_the_posterior(unet):
    denoiser, abar_T = toy_denoiser.denoiser(), toy_denoiser.abar()
    batch = toy_denoiser.batch(4)
    k_z, k_eps, k_t = jax.random.split(KEY, 3)
    z = batch["mean"] + batch["std"] * normal_like(k_z, batch["mean"])
    eps, t = normal_like(k_eps, z), timesteps(k_t, 4, toy_denoiser.T)
    expected, _ = denoiser.losses_at(unet, abar_T, z, t, eps, batch["text"])
    jitted = jax.jit(denoiser.losses)
    loss, _ = jitted(unet, abar_T, batch, KEY)
    narrow, _ = jitted(unet, abar_T, batch | {"std": 0 * z}, KEY)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert not np.allclose(loss, narrow, rtol=1e-3)


def test_hidden_states_come_only_when_asked_for(unet):
    denoiser, args = toy_denoiser.denoiser(), (toy_denoiser.abar(),)
    args = (unet, *args, toy_denoiser.batch(2), KEY)
    assert denoiser.losses(*args)[1] == {}
    hiddens = denoiser.losses(*args, ("transformer",))[1]
    assert {name: h.shape for name, h in hiddens.items()} == {"block": (2, 4, 4)}
