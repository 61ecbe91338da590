# SPDX-License-Identifier: Apache-2.0
"""The objectives against NumPy and PyTorch diffusers, and what their gradients do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import check_equal

from gift_jax.defenses import objectives
from gift_jax.diffusion import (
    add_noise,
    example_keys,
    normal_like,
    prediction_target,
    squared_error,
    timesteps,
)
from gift_jax.models.sd import stable_diffusion
from gift_jax.state import accumulate_gradients

KEY = jax.random.key(7)
B, N, WIDTH = 3, 12, 5


@pytest.fixture
def latents(rng):
    """z, eps, abar of a batch of four."""
    z, eps = rng.normal(size=(2, 4, 4, 3, 3)).astype(np.float32)
    return z, eps, np.asarray([0.9991, 0.7, 0.2, 0.005], np.float32)


@pytest.fixture
def hidden(rng):
    """One layer's output, "B N D", far from N(0, 1)."""
    return (2.0 + 3.0 * rng.normal(size=(B, N, WIDTH))).astype(np.float32)


def test_add_noise_equals_numpy(latents):
    z, eps, abar = latents
    a = abar.astype(np.float64).reshape(4, 1, 1, 1)
    expected = np.sqrt(a) * z + np.sqrt(1 - a) * eps
    np.testing.assert_allclose(add_noise(z, eps, abar), expected, atol=1e-6)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("cls", ["DDPM", "DDIM", "PNDM"])
def test_add_noise_and_targets_equal_pytorch(cls, name, zero_snr, rng):
    torch = pytest.importorskip("torch")
    import diffusers

    changes = {"beta_schedule": name, "beta_start": 0.00085, "beta_end": 0.012}
    if zero_snr and cls != "PNDM":  # which knows nothing of it
        changes["rescale_betas_zero_snr"] = True
    scheduler = getattr(diffusers, f"{cls}Scheduler")(**changes)
    config = {"num_train_timesteps": 1000, **changes}
    t = np.asarray([0, 1, 20, 250, 500, 750, 980, 998, 999])
    z, eps = rng.normal(size=(2, len(t), 4, 8, 8)).astype(np.float32)
    abar_T = stable_diffusion.alphas_cumprod(config)
    abar = np.float32(abar_T[t])
    ours = {"noised": add_noise(z, eps, abar)}
    if hasattr(scheduler, "get_velocity"):
        ours["velocity"] = prediction_target(z, eps, abar, "v_prediction")

    def theirs(dtype):
        inputs = [torch.tensor(a, dtype=dtype) for a in (z, eps)] + [torch.tensor(t)]
        found = {"noised": scheduler.add_noise(*inputs)}
        if hasattr(scheduler, "get_velocity"):
            found["velocity"] = scheduler.get_velocity(*inputs)
        return by_time({name: a.numpy() for name, a in found.items()})

    def theirs_in_double():  # its own schedule is in float32: 1 - abar[0] is 4e-5
        scheduler.alphas_cumprod = torch.tensor(abar_T)
        return theirs(torch.float64)

    def by_time(arrays):
        return {(n, t[i]): a[i] for n, a in arrays.items() for i in range(len(t))}

    check_equal(cls, by_time(ours), theirs(torch.float32), theirs_in_double)


def test_target_is_eps_or_v(latents):
    z, eps, abar = latents
    np.testing.assert_array_equal(prediction_target(z, eps, abar, "epsilon"), eps)
    a = abar.astype(np.float64).reshape(4, 1, 1, 1)
    expected = np.sqrt(a) * eps - np.sqrt(1 - a) * z
    ours = prediction_target(z, eps, abar, "v_prediction")
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    with pytest.raises(ValueError, match="prediction_type='sample' is not epsilon"):
        prediction_target(z, eps, abar, "sample")


def test_add_noise_refuses_shapes_that_differ(latents):
    z, eps, abar = latents
    with pytest.raises(ValueError, match="differ"):
        add_noise(z, eps[:1], abar)


def test_squared_error_is_a_mean_per_example_in_float32(latents):
    z, eps, _ = latents
    expected = np.square(z.astype(np.float64) - eps).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(squared_error(z, eps), expected, rtol=1e-6)
    ours = squared_error(jnp.asarray(z, jnp.bfloat16), eps)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, rtol=2e-2)


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


def test_timesteps_cover_the_range_by_place(latents):
    t = np.asarray(timesteps(KEY, 4000, 10))
    counts = np.bincount(t, minlength=10)
    assert len(counts) == 10
    assert counts.min() > 300
    np.testing.assert_array_equal(timesteps(KEY, 7, 10), t[:7])


# --- the ascent -----------------------------------------------------------------------

LOSS = np.asarray([0.25, 0.9, 1.1, 40.0], np.float32)


def ascent_gradient(bound, cap=1.0):
    return np.asarray(jax.grad(objectives.bounded_ascent)(LOSS, bound, cap)) * len(LOSS)


def test_ascent_values():
    value = objectives.bounded_ascent
    np.testing.assert_allclose(value(LOSS, "raw", 1.0), -LOSS.mean(), rtol=1e-6)
    expected = -np.minimum(LOSS, 1.0).mean()
    np.testing.assert_allclose(value(LOSS, "hinge", 1.0), expected, rtol=1e-6)
    expected = -np.log(1 + LOSS).mean()
    np.testing.assert_allclose(value(LOSS, "log", 1.0), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="bound='clip' must be one of hinge, log, raw"):
        value(LOSS, "clip", 1.0)


def test_raw_ascent_pulls_every_example_alike():
    np.testing.assert_allclose(ascent_gradient("raw"), [-1, -1, -1, -1])


def test_hinge_lets_go_of_each_example_at_the_cap():
    np.testing.assert_array_equal(ascent_gradient("hinge"), [-1, -1, 0, 0])
    np.testing.assert_array_equal(ascent_gradient("hinge", 2.0), [-1, -1, -1, 0])


def test_log_ascent_fades():
    np.testing.assert_allclose(ascent_gradient("log"), -1 / (1 + LOSS), rtol=1e-6)


# --- representation noising -----------------------------------------------------------


def test_standard_noise_ignores_the_states_and_matched_follows_them(hidden):
    standard = objectives.noise_target(KEY, hidden, "standard")
    np.testing.assert_array_equal(
        standard, objectives.noise_target(KEY, hidden * 5, "standard")
    )
    matched = objectives.noise_target(KEY, hidden, "matched")
    assert not np.allclose(standard, matched, atol=0.5)
    mean, std = hidden.mean((0, 1)), hidden.std((0, 1))
    expected = mean[None, None] + std[None, None] * np.asarray(standard)
    np.testing.assert_allclose(matched, expected, atol=1e-5)
    with pytest.raises(ValueError, match="noise_target='own' must be one of standard"):
        objectives.noise_target(KEY, hidden, "own")


def test_no_gradient_flows_through_the_matched_target(hidden):
    def total(h):
        return jnp.sum(jnp.square(objectives.noise_target(KEY, h, "matched")))

    assert float(total(hidden)) > 0
    np.testing.assert_array_equal(jax.grad(total)(hidden), np.zeros_like(hidden))


def mmd_by_loops(x, y):
    """Equation 5 of Gretton et al. 2012, pair by pair, with RepNoise's kernels."""
    both = np.concatenate([x, y]).astype(np.float64)
    square = np.square(both[:, None] - both[None]).sum(-1)
    mean = square.sum() / (len(both) ** 2 - len(both))
    kernel = sum(np.exp(-square / (mean * w)) for w in (0.25, 0.5, 1, 2, 4))
    n = len(x)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()


def test_mmd_equals_the_sum_over_pairs(rng, hidden):
    x, y = hidden[0], rng.normal(size=(N, WIDTH)).astype(np.float32)
    expected = mmd_by_loops(x, y)
    assert expected > 0.1
    np.testing.assert_allclose(objectives.mmd(x, y), expected, rtol=1e-4)
    assert abs(float(objectives.mmd(x, x))) < 1e-6


def test_mmd_is_smaller_between_samples_of_one_distribution(rng):
    x, y, far = rng.normal(size=(3, 64, WIDTH)).astype(np.float32)
    assert float(objectives.mmd(x, y)) < 0.2 * float(objectives.mmd(x, far + 1.0))


@pytest.mark.parametrize("target", objectives.NOISE_TARGETS)
@pytest.mark.parametrize("distance", objectives.DISTANCES)
def test_noising_moves_with_the_states_even_of_one_example(hidden, target, distance):
    def noising(h):
        return objectives.representation_noising(KEY, {"l": h}, target, distance)

    one = hidden[:1]
    value, grad = jax.value_and_grad(noising)(one)
    moved = (one * 1.3 + (one > 2)).astype(np.float32)
    assert abs(float(value) - float(noising(moved))) > 1e-3
    assert np.abs(grad).max() > 1e-6
    lower = noising(one - 0.01 * grad / np.linalg.norm(grad))
    assert float(lower) < float(value)


def test_noising_targets_and_distances_differ(hidden):
    values = [
        float(objectives.representation_noising(KEY, {"l": hidden}, target, distance))
        for target in objectives.NOISE_TARGETS
        for distance in objectives.DISTANCES
    ]
    assert len({round(value, 4) for value in values}) == 4


def test_mse_noising_is_the_mean_over_layers_with_noise_of_their_own(hidden):
    layers = {"b": hidden, "a": hidden[:, :4], "c": hidden.reshape(B, 3, 4, WIDTH)}
    ours = objectives.representation_noising(KEY, layers, "standard", "mse")
    keys = dict(zip("abc", jax.random.split(KEY, 3), strict=True))
    parts = []
    for name, h in layers.items():
        noise = normal_like(keys[name], h.reshape(B, -1, WIDTH))
        parts.append(np.square(h.reshape(B, -1, WIDTH) - noise).mean())
    assert len({round(float(part), 3) for part in parts}) == 3
    np.testing.assert_allclose(ours, np.mean(parts), rtol=1e-5)


def test_mmd_noising_uses_at_most_so_many_tokens(hidden):
    def noising(h, tokens):
        layer = {"l": h}
        return float(
            objectives.representation_noising(KEY, layer, "standard", "mmd", tokens)
        )

    changed = hidden.copy()
    changed[:, 1::2] += 10.0
    assert noising(hidden, N) != noising(changed, N)
    assert noising(hidden, N // 2) == noising(changed, N // 2)


def test_noising_refuses_no_layer_and_unknown_names(hidden):
    with pytest.raises(ValueError, match="at least one layer"):
        objectives.representation_noising(KEY, {}, "standard", "mse")
    with pytest.raises(ValueError, match="distance='cosine' must be one of mse, mmd"):
        objectives.representation_noising(KEY, {"l": hidden}, "standard", "cosine")


# --- several concepts -----------------------------------------------------------------


def test_loss_of_each_concept_is_the_mean_of_its_pairs():
    loss, concept = jnp.asarray([1.0, 2.0, 4.0, 9.0]), jnp.asarray([0, 2, 0, 2])
    found = objectives.losses_by_concept(loss, concept, ("bomb", "pill", "dagger"))
    assert list(found) == ["concept/bomb", "concept/pill", "concept/dagger"]
    assert [float(x) for x in found.values()][::2] == [2.5, 5.5]
    assert np.isnan(found["concept/pill"])  # no pair of it
    assert not objectives.losses_by_concept(loss, jnp.zeros(4, int), ("bomb",))


@pytest.mark.parametrize("parts", [2, 3])
def test_gradient_in_parts_is_that_of_the_whole(rng, parts):
    x_BD = rng.normal(size=(6, 4)).astype(np.float32)
    batch = {"mean": jnp.asarray(x_BD), "index": jnp.arange(6, dtype=jnp.int32)}
    params, key = {"w": jnp.arange(4.0)}, jax.random.key(1)

    def loss(params, frozen, batch, key):
        noise = normal_like(key, batch["mean"], batch["index"])
        t = timesteps(key, len(noise), 9, batch["index"])
        out = (batch["mean"] + noise) * params["w"][None, :] * (1 + t)[:, None]
        total = jnp.mean(jnp.square(out - frozen))
        return total, {"loss": total}

    grad_fn = jax.grad(loss, has_aux=True)
    whole, said = grad_fn(params, 0.5, batch, key)
    grads, metrics = accumulate_gradients(grad_fn, parts)(params, 0.5, batch, key)
    np.testing.assert_allclose(grads["w"], whole["w"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], said["loss"], rtol=1e-5)
    without = batch | {"index": jnp.zeros(6, jnp.int32)}  # other noise
    other, _ = grad_fn(params, 0.5, without, key)
    assert np.abs(other["w"] - whole["w"]).max() > 1e-2
