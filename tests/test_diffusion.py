# SPDX-License-Identifier: Apache-2.0
"""Noise, the noise process against NumPy and PyTorch, and the loss of cached pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_denoiser
from tiny_model import check_equal

from gift_jax.diffusion import (
    Ddpm,
    FlowMatching,
    add_noise,
    example_keys,
    normal_like,
    squared_error,
    timesteps,
)
from gift_jax.models.sd.scheduler_config import alphas_cumprod
from gift_jax.state import merge_params

KEY = jax.random.key(7)
ABAR = np.asarray([0.9991, 0.7, 0.2, 0.005], np.float32)
SIGMA = np.float32(np.linspace(1, 0.001, 1000))
SIGMA = 3 * SIGMA / (1 + 2 * SIGMA)  # as SD3 shifts them


@pytest.fixture
def latents(rng):
    """z and eps of a batch of four, one at each of four timesteps."""
    z, eps = rng.normal(size=(2, 4, 4, 3, 3)).astype(np.float32)
    return z, eps, np.arange(4)


@pytest.fixture
def network():
    return merge_params(toy_denoiser.params(), {})


# --- what is drawn --------------------------------------------------------------------


def test_noise_is_drawn_by_the_place_in_the_batch(latents):
    z, _, _ = latents
    whole = normal_like(KEY, z)
    keys = example_keys(KEY, jnp.arange(2, 4))
    half = jax.vmap(lambda k: jax.random.normal(k, z.shape[1:]))(keys)
    assert len(np.unique(whole.reshape(4, -1), axis=0)) == 4
    np.testing.assert_array_equal(normal_like(KEY, z[:2]), whole[:2])
    np.testing.assert_array_equal(half, whole[2:])
    assert not np.allclose(normal_like(jax.random.key(8), z), whole)


def test_noise_is_standard_normal():
    noise = np.asarray(normal_like(KEY, jnp.zeros((64, 400))))
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert abs(np.corrcoef(noise[0], noise[1])[0, 1]) < 0.2


def test_timesteps_cover_the_range_by_place():
    t = np.asarray(timesteps(KEY, 4000, 10))
    counts = np.bincount(t, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 300
    np.testing.assert_array_equal(timesteps(KEY, 7, 10), t[:7])
    np.testing.assert_array_equal(Ddpm(np.ones(10)).sample_t(KEY, 7), t[:7])


def test_limit_is_a_share_of_the_same_timesteps():
    for noise in (Ddpm(np.ones(10)), FlowMatching(SIGMA)):
        t = np.asarray(noise.sample_t(KEY, 500))
        half = np.asarray(noise.sample_t(KEY, 500, limit=0.5))
        assert half.dtype == t.dtype
        np.testing.assert_array_equal(half, (t * 0.5).astype(t.dtype))
        np.testing.assert_array_equal(noise.sample_t(KEY, 500, limit=1.0), t)


# --- the noise process of DDPM --------------------------------------------------------


def test_noised_latents_equal_numpy(latents):
    z, eps, t = latents
    a = ABAR.astype(np.float64).reshape(4, 1, 1, 1)
    expected = np.sqrt(a) * z + np.sqrt(1 - a) * eps
    np.testing.assert_allclose(Ddpm(ABAR).noised(z, eps, t), expected, atol=1e-6)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("cls", ["DDPM", "DDIM", "PNDM"])
def test_noised_latents_and_targets_equal_pytorch(cls, name, zero_snr, rng):
    torch = pytest.importorskip("torch")
    import diffusers

    changes = {"beta_schedule": name, "beta_start": 0.00085, "beta_end": 0.012}
    if zero_snr and cls != "PNDM":  # which knows nothing of it
        changes["rescale_betas_zero_snr"] = True
    scheduler = getattr(diffusers, f"{cls}Scheduler")(**changes)
    config = {"num_train_timesteps": 1000, **changes}
    t = np.asarray([0, 1, 20, 250, 500, 750, 980, 998, 999])
    z, eps = rng.normal(size=(2, len(t), 4, 8, 8)).astype(np.float32)
    abar_T = alphas_cumprod(config)
    noise = Ddpm(np.float32(abar_T), "v_prediction")
    ours = {"noised": noise.noised(z, eps, t)}
    if hasattr(scheduler, "get_velocity"):
        ours["velocity"] = noise.target(z, eps, t)

    def theirs(dtype):
        inputs = [torch.tensor(a, dtype=dtype) for a in (z, eps)] + [torch.tensor(t)]
        arrays = {"noised": scheduler.add_noise(*inputs)}
        if hasattr(scheduler, "get_velocity"):
            arrays["velocity"] = scheduler.get_velocity(*inputs)
        return by_time({name: a.numpy() for name, a in arrays.items()})

    def theirs_in_double():  # its own schedule is in float32: 1 - abar[0] is 4e-5
        scheduler.alphas_cumprod = torch.tensor(abar_T)
        return theirs(torch.float64)

    def by_time(arrays):
        return {(n, t[i]): a[i] for n, a in arrays.items() for i in range(len(t))}

    check_equal(cls, by_time(ours), theirs(torch.float32), theirs_in_double)


def test_target_is_eps_or_v_and_its_noise_is_eps_again(latents):
    z, eps, t = latents
    np.testing.assert_array_equal(Ddpm(ABAR).target(z, eps, t), eps)
    np.testing.assert_array_equal(Ddpm(ABAR).noise_of(eps, z, t), eps)
    a = ABAR.astype(np.float64).reshape(4, 1, 1, 1)
    noise = Ddpm(ABAR, "v_prediction")
    v = noise.target(z, eps, t)
    np.testing.assert_allclose(v, np.sqrt(a) * eps - np.sqrt(1 - a) * z, atol=1e-6)
    z_t = noise.noised(z, eps, t)
    np.testing.assert_allclose(noise.noise_of(v, z_t, t), eps, atol=1e-5)


def test_unknown_prediction_type_is_an_error():
    with pytest.raises(ValueError, match="'sample' must be one of epsilon, v_pred"):
        Ddpm(ABAR, "sample")


def test_add_noise_refuses_shapes_that_differ(latents):
    z, eps, _ = latents
    with pytest.raises(ValueError, match="differ"):
        add_noise(z, eps[:1], ABAR)


# --- flow matching --------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd3_scheduler():
    pytest.importorskip("torch")
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 1.7)])
def test_flow_timesteps_are_those_of_diffusers_script(
    sd3_scheduler, monkeypatch, mean, std
):
    import torch
    from diffusers.training_utils import compute_density_for_timestep_sampling

    keys = example_keys(KEY, jnp.arange(400))
    normal = np.asarray(jax.vmap(lambda k: jax.random.normal(k, ()))(keys))
    monkeypatch.setattr(
        torch,
        "normal",
        lambda mean, std, **how: mean + std * torch.tensor(normal),
    )
    u = compute_density_for_timestep_sampling("logit_normal", 400, mean, std)
    places = (u * sd3_scheduler.config.num_train_timesteps).long()
    theirs = sd3_scheduler.timesteps[places].numpy()
    ours = np.asarray(FlowMatching(SIGMA, mean, std).sample_t(KEY, 400))
    assert len(np.unique(theirs)) > 200
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    np.testing.assert_allclose(ours / 1000, sd3_scheduler.sigmas[places], rtol=1e-6)


def test_flow_timesteps_are_drawn_by_place():
    noise = FlowMatching(SIGMA)
    t = np.asarray(noise.sample_t(KEY, 20))
    np.testing.assert_array_equal(noise.sample_t(KEY, 7), t[:7])
    np.testing.assert_array_equal(noise.sample_t(KEY, 5, jnp.arange(9, 14)), t[9:14])
    assert len(np.unique(t)) > 15 and t.min() > 0 and t.max() <= 1000
    certain = FlowMatching(SIGMA, 100.0)  # u is 1, and has no place
    np.testing.assert_allclose(certain.sample_t(KEY, 3), 1000 * SIGMA[-1], rtol=1e-6)


def test_flow_equals_pytorch_and_turns_back(latents, sd3_scheduler):
    import torch

    z, eps, _ = latents
    noise, places = FlowMatching(SIGMA), np.asarray([0, 400, 700, 999])
    t = sd3_scheduler.timesteps[places]
    theirs = sd3_scheduler.scale_noise(torch.tensor(z), t, torch.tensor(eps))
    z_t = noise.noised(z, eps, t.numpy())
    np.testing.assert_allclose(z_t, theirs, atol=1e-6)
    np.testing.assert_allclose(z_t[0], eps[0], atol=1e-6)
    assert np.abs(z_t[-1] - z[-1]).max() < 0.03 < np.abs(z_t[2] - z[2]).max()
    velocity = noise.target(z, eps, t.numpy())
    np.testing.assert_array_equal(velocity, eps - z)
    assert np.abs(velocity - eps).max() > 1
    np.testing.assert_allclose(noise.noise_of(velocity, z_t, t.numpy()), eps, atol=1e-5)
    with pytest.raises(ValueError, match="differ"):
        noise.noised(z, eps[:1], t.numpy())


def test_flow_timesteps_of_rows_lie_up_to_the_row_before():
    t_S = np.asarray([1000.0, 700.0, 300.0])
    row = np.repeat(np.arange(3), 200)
    t = np.asarray(FlowMatching(SIGMA).sample_t_of_rows(KEY, row, t_S)).reshape(3, 200)
    np.testing.assert_array_equal(t[0], 1000)
    for low, high, some in ((700, 1000, t[1]), (300, 700, t[2])):
        assert low <= some.min() < low + 20 and high - 20 < some.max() <= high


# --- the loss -------------------------------------------------------------------------


def test_squared_error_is_a_mean_per_example_in_float32(latents):
    z, eps, _ = latents
    expected = np.square(z.astype(np.float64) - eps).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(squared_error(z, eps), expected, rtol=1e-6)
    ours = squared_error(jnp.asarray(z, jnp.bfloat16), eps)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, rtol=2e-2)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_loss_equals_numpy(network, rng, kind):
    denoiser, batch = toy_denoiser.denoiser(kind), toy_denoiser.batch(3)
    z, t = np.asarray(batch["mean"]), np.asarray([0, 4, 9])
    eps = rng.normal(size=z.shape).astype(np.float32)
    loss, _ = denoiser.losses_at(network, z, t, eps, batch["cond"])
    a = np.float32(toy_denoiser.noise().abar_T)[t].reshape(3, 1, 1, 1)
    z_t = np.sqrt(a) * z + np.sqrt(1 - a) * eps
    target = eps if kind == "epsilon" else np.sqrt(a) * eps - np.sqrt(1 - a) * z
    if kind == "flow":
        sigma = np.float32(t / toy_denoiser.T).reshape(3, 1, 1, 1)
        z_t, target = (1 - sigma) * z + sigma * eps, eps - z
    out, _ = toy_denoiser.predict(network, z_t, t, batch["cond"])
    expected = np.square(np.asarray(out) - target).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def losses():
    """The toy's losses, jitted."""
    return jax.jit(toy_denoiser.denoiser().losses)


def test_each_example_has_noise_and_timestep_of_its_own(network, losses):
    one = toy_denoiser.batch(1)
    batch = jax.tree.map(lambda a: np.repeat(a, 8, axis=0), one)
    assert len(np.unique(losses(network, batch, KEY)[0])) == 8


def test_loss_of_an_example_does_not_depend_on_the_rest_of_the_batch(network, losses):
    batch = toy_denoiser.batch(4)
    whole, _ = losses(network, batch, KEY)
    part, _ = losses(network, jax.tree.map(lambda a: a[:2], batch), KEY)
    np.testing.assert_allclose(part, whole[:2], rtol=1e-5)
    last = jax.tree.map(lambda a: a[2:], batch) | {"index": jnp.asarray([2, 3])}
    np.testing.assert_allclose(losses(network, last, KEY)[0], whole[2:], rtol=1e-5)


def test_latents_are_drawn_from_the_posterior(network, losses):
    batch = toy_denoiser.batch(4)
    k_z, k_eps, k_t = jax.random.split(KEY, 3)
    z = batch["mean"] + batch["std"] * normal_like(k_z, batch["mean"])
    eps, t = normal_like(k_eps, z), timesteps(k_t, 4, toy_denoiser.T)
    denoiser = toy_denoiser.denoiser()
    expected, _ = denoiser.losses_at(network, z, t, eps, batch["cond"])
    loss, _ = losses(network, batch, KEY)
    narrow, _ = losses(network, batch | {"std": 0 * z}, KEY)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert not np.allclose(loss, narrow, rtol=1e-3)


def test_hidden_states_come_only_when_asked_for(network):
    args = network, toy_denoiser.batch(2), KEY
    denoiser = toy_denoiser.denoiser()
    assert denoiser.losses(*args)[1] == {}
    hiddens = denoiser.losses(*args, ("transformer",))[1]
    assert {name: h.shape for name, h in hiddens.items()} == {"block": (2, 4, 4)}
