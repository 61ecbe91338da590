# SPDX-License-Identifier: Apache-2.0
"""The upper level's objectives against NumPy, and what their gradients do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gift_jax.defenses import objectives
from gift_jax.diffusion import normal_like, timesteps
from gift_jax.state import accumulate_gradients

KEY = jax.random.key(7)
B, N, WIDTH = 3, 12, 5


@pytest.fixture
def hidden(rng):
    """One layer's output, "B N D", far from N(0, 1)."""
    return (2.0 + 3.0 * rng.normal(size=(B, N, WIDTH))).astype(np.float32)


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
    names = ("bomb", "pill", "dagger")
    losses = objectives.losses_by_concept(loss, concept, names)
    assert list(losses) == [f"harmful_loss/{name}" for name in names]
    assert [float(x) for x in losses.values()][::2] == [2.5, 5.5]
    assert np.isnan(losses["harmful_loss/pill"])  # no pair of it
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
    whole, expected = grad_fn(params, 0.5, batch, key)
    grads, metrics = accumulate_gradients(grad_fn, parts)(params, 0.5, batch, key)
    np.testing.assert_allclose(grads["w"], whole["w"], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    without = batch | {"index": jnp.zeros(6, jnp.int32)}  # other noise
    other, _ = grad_fn(params, 0.5, without, key)
    assert np.abs(other["w"] - whole["w"]).max() > 1e-2
