# SPDX-License-Identifier: Apache-2.0
"""GIFT's step: what each level does, and its three gradients, on the toy denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_denoiser

from gift_jax.defenses import gift
from gift_jax.diffusion import add_noise, normal_like, timesteps
from gift_jax.models.trainable import select_trainable
from gift_jax.runtime.errors import UserError
from gift_jax.state import global_norm, make_update, merge_params, repeat_update
from gift_jax.training import setup
from gift_jax.training.optimizer import Optimizer, make_optimizer

KEY = jax.random.key(11)
NO_ASCENT = {"ascent_bound": "hinge", "ascent_cap": 0.0}


def level_keys(step=0):
    return jax.random.split(jax.random.fold_in(KEY, step))


def norm(tree):
    return float(global_norm(tree))


def difference(a, b):
    return jax.tree.map(lambda x, y: x - y, a, b)


def assert_close(a, b, rtol=1e-5, atol=1e-7):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), a, b)


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


# --- direction ------------------------------------------------------------------------


def test_lower_step_lowers_the_safe_loss(toy):
    loss = gift.make_lower_loss(toy.denoiser)
    tx = optax.sgd(0.05)
    update = jax.jit(make_update("lower", loss, tx))
    args = (toy.frozen, toy.batch["safe"], KEY)
    new, opt, metrics = update(toy.params, tx.init(toy.params), *args)
    assert norm(difference(new, toy.params)) > 1e-3
    after = update(new, opt, *args)[2]
    assert float(after["lower/loss"]) < float(metrics["lower/loss"])
    assert float(metrics["lower/grad_norm"]) > 0


def test_distances_are_mean_squares_at_what_the_loss_draws(toy):
    safe = toy.batch["safe"]
    one = merge_params(toy.params, toy.frozen["network"])
    other = jax.tree.map(lambda a: a + 0.1, one)
    distance_B = toy.denoiser.distances(one, other, safe, KEY)
    k_z, k_eps, k_t = jax.random.split(KEY, 3)
    z = safe["mean"] + safe["std"] * normal_like(k_z, safe["mean"])
    t = timesteps(k_t, len(z), toy_denoiser.T)
    z_t = add_noise(z, normal_like(k_eps, z), toy.denoiser.noise.abar(t))
    a, b = (toy.denoiser.predict(p, z_t, t, safe["cond"])[0] for p in (one, other))
    assert distance_B.shape == (len(z),) and float(distance_B.min()) > 1e-4
    expected = np.square(a - b).mean((1, 2, 3))
    np.testing.assert_allclose(distance_B, expected, rtol=1e-5)


@pytest.mark.parametrize("bound", ["raw", "hinge", "log"])
def test_upper_step_raises_the_harmful_loss(toy, bound):
    s = gift.Gift(ascent_bound=bound, ascent_cap=100.0)
    loss = gift.make_upper_loss(toy.denoiser, s)
    tx = optax.sgd(0.05)
    update = jax.jit(make_update("upper", loss, tx))
    args = (toy.frozen, toy.batch["harmful"], KEY)
    new, opt, metrics = update(toy.params, tx.init(toy.params), *args)
    assert norm(difference(new, toy.params)) > 1e-3
    after = update(new, opt, *args)[2]
    assert float(after["upper/harmful_loss"]) > float(metrics["upper/harmful_loss"])
    assert float(after["upper/loss"]) < float(metrics["upper/loss"])


@pytest.mark.parametrize("target, distance", [("standard", "mse"), ("matched", "mmd")])
def test_noising_alone_brings_states_nearer_to_noise(toy, target, distance):
    settings = gift.Gift(beta=1.0, **NO_ASCENT, noise_target=target, distance=distance)
    loss = gift.make_upper_loss(toy.denoiser, settings)
    args = (toy.frozen, toy.batch["harmful"], KEY)
    grad_fn = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, before), grads = grad_fn(toy.params, *args)
    assert norm(grads) > 1e-5
    step = jax.tree.map(lambda p, g: p - 1e-2 / norm(grads) * g, toy.params, grads)
    (_, after), _ = grad_fn(step, *args)
    assert float(after["upper/noise_loss"]) < float(before["upper/noise_loss"])


def test_past_the_cap_and_without_noising_the_upper_level_rests(toy):
    state, step = toy.step(**NO_ASCENT, beta=0.0, inner_steps=0)
    new, metrics = step(state, toy.frozen, toy.batch, KEY)
    assert float(metrics["upper/grad_norm"]) == 0
    assert_identical(new.params, toy.params)
    state, step = toy.step(beta=0.0, inner_steps=0)
    new, metrics = step(state, toy.frozen, toy.batch, KEY)
    assert float(metrics["upper/grad_norm"]) > 0
    assert "upper/noise_loss" not in metrics


def test_beta_weighs_the_noising(toy):
    def parts(beta):
        loss = gift.make_upper_loss(toy.denoiser, gift.Gift(beta=beta))
        args = (toy.params, toy.frozen, toy.batch["harmful"], KEY)
        total, metrics = jax.jit(loss)(*args)
        return float(total), float(metrics.get("upper/noise_loss", 0.0))

    bare, _ = parts(0.0)
    total, noising = parts(0.5)
    assert noising > 0.1
    np.testing.assert_allclose(total, bare + 0.5 * noising, rtol=1e-5)


# --- one outer step -------------------------------------------------------------------


def test_step_is_lower_updates_then_upper_updates(toy):
    settings = gift.Gift(inner_steps=2, outer_steps=3)
    batch = {
        "safe": toy_denoiser.batch(2 * 2, seed=0),
        "harmful": toy_denoiser.batch(3 * 2, seed=1),
    }
    lower, upper = optax.adam(1e-2), optax.sgd(0.1)
    step = jax.jit(gift.make_step(toy.denoiser, settings, lower, upper))
    new, metrics = step(toy.state(lower, upper), toy.frozen, batch, KEY)

    params, expected = toy.params, {}
    plan = [
        ("lower", gift.make_lower_loss(toy.denoiser), lower, "safe", 2),
        ("upper", gift.make_upper_loss(toy.denoiser, settings), upper, "harmful", 3),
    ]
    for (name, loss, tx, group, count), key in zip(plan, level_keys(), strict=True):
        opt, update = tx.init(params), jax.jit(make_update(name, loss, tx))
        for i, k in enumerate(jax.random.split(key, count)):
            every = slice(i, None, count)
            part = jax.tree.map(lambda a, every=every: a[every], batch[group])
            before = params
            params, opt, m = update(params, opt, toy.frozen, part, k)
            assert norm(difference(before, params)) > 1e-3
        assert_close(new.opt[name], opt, 1e-4, 1e-6)
        expected |= m
    assert_close(new.params, params, 1e-4, 1e-5)
    assert_close(metrics, expected, 1e-4)
    assert int(new.step) == 1


def test_only_the_trainable_parameters_are_in_the_state(toy):
    state, step = toy.step()
    before = jax.device_get(toy.frozen)
    new, _ = step(state, toy.frozen, toy.batch, KEY)
    assert set(new.params) == {p for p in toy_denoiser.SHAPES if "attn2" in p}
    assert all(norm(new.params[p] - toy.params[p]) > 0 for p in toy.params)
    assert_identical(before, toy.frozen)


def test_steps_and_levels_draw_noise_of_their_own(toy):
    batch = {"safe": toy.batch["safe"], "harmful": toy.batch["safe"]}
    state, step = toy.step(optax.sgd(0.0), optax.sgd(0.0), beta=0.0)
    losses = []
    for _ in range(3):
        state, metrics = step(state, toy.frozen, batch, KEY)
        losses += [metrics["lower/loss"], metrics["upper/harmful_loss"]]
    assert len({float(loss) for loss in losses}) == 6
    again, metrics = step(state.replace(step=jnp.int32(0)), toy.frozen, batch, KEY)
    assert float(metrics["lower/loss"]) == float(losses[0])
    _, other = step(again, toy.frozen, batch, jax.random.key(12))
    assert float(other["lower/loss"]) not in {float(loss) for loss in losses}


@pytest.mark.parametrize("gradient", gift.GRADIENTS)
def test_second_call_does_not_compile_again(toy, gradient):
    state, step = toy.step(optax.adam(1e-3), optax.adam(1e-3), gradient=gradient)
    for _ in range(2):
        state, _ = step(state, toy.frozen, toy.batch, KEY)
    assert step._cache_size() == 1


# --- the hypergradient ----------------------------------------------------------------


@pytest.mark.parametrize("name, inner_steps", [("sgd", 3), ("adam", 1)])
def test_hypergradient_equals_finite_differences(x64, toy_factory, name, inner_steps):
    toy = toy_factory(np.float64, 2 * inner_steps)
    tx = {"sgd": optax.sgd(0.3), "adam": optax.adam(0.5)}[name]
    safe, harmful = toy.batch["safe"], toy.batch["harmful"]
    update = make_update("lower", gift.make_lower_loss(toy.denoiser), tx)
    lower = repeat_update(update, inner_steps)
    # Not "matched" noise: it follows the parameters, but no gradient goes through it.
    upper_loss = gift.make_upper_loss(toy.denoiser, gift.Gift(beta=0.3))
    k_lower, k_upper = level_keys()

    @jax.jit
    def warm(params):  # a first Adam step is a sign: its derivative says nothing
        return update(params, tx.init(params), toy.frozen, safe, KEY)[1]

    @jax.jit
    def value(params, opt):
        reached, *_ = lower(params, opt, toy.frozen, safe, k_lower)
        return upper_loss(reached, toy.frozen, harmful, k_upper)[0]

    opt = warm(toy.params)
    grads, (reached, *_) = jax.jit(gift.hypergradient(lower, upper_loss))(
        toy.params, opt, toy.frozen, toy.batch, k_lower, k_upper
    )
    plain, _ = jax.jit(jax.grad(upper_loss, has_aux=True))(
        reached, toy.frozen, harmful, k_upper
    )
    assert all(g.dtype == np.float64 for g in grads.values())
    rng = np.random.default_rng(0)
    for _ in range(2):
        along = {p: rng.normal(size=g.shape) for p, g in grads.items()}
        up, down = (
            value({p: toy.params[p] + h * along[p] for p in along}, opt)
            for h in (1e-6, -1e-6)
        )
        numeric = float(up - down) / 2e-6
        exact, first_order = (
            sum(np.vdot(g[p], along[p]) for p in along) for g in (grads, plain)
        )
        np.testing.assert_allclose(exact, numeric, rtol=1e-4)
        assert abs(first_order - numeric) > 1e-2 * abs(numeric)


def test_unrolled_without_inner_steps_is_first_order(toy):
    def after(gradient, inner_steps):
        state, step = toy.step(gradient=gradient, inner_steps=inner_steps)
        return jax.device_get(step(state, toy.frozen, toy.batch, KEY)[0].params)

    assert_identical(after("unrolled", 0), after("first_order", 0))
    moved = difference(after("unrolled", 1), after("first_order", 1))
    assert norm(moved) > 1e-4


def test_unrolled_gradient_survives_a_parameter_without_gradient(toy):
    tx = make_optimizer(Optimizer(lr=1e-3, schedule="cosine"), 10)
    states = toy.batch["safe"]["cond"]["states"].at[..., 0].set(0.0)
    batch = toy.batch | {"safe": toy.batch["safe"] | {"cond": {"states": states}}}
    grads, _ = jax.jit(jax.grad(gift.make_lower_loss(toy.denoiser), has_aux=True))(
        toy.params, toy.frozen, batch["safe"], KEY
    )
    assert not grads["block/attn2/to_v/kernel"][0].any()
    state, step = toy.step(tx, tx, gradient="unrolled")
    _, metrics = step(state, toy.frozen, batch, KEY)
    assert np.isfinite(float(metrics["upper/grad_norm"]))


# --- joint ----------------------------------------------------------------------------


def test_joint_gradient_is_the_weighted_sum(toy):
    state, step = toy.step(upper=optax.sgd(1.0), gradient="joint", joint_weight=0.7)
    new, metrics = step(state, toy.frozen, toy.batch, KEY)
    k_lower, k_upper = level_keys()
    lower_loss = gift.make_lower_loss(toy.denoiser)
    lower, _ = jax.jit(jax.grad(lower_loss, has_aux=True))(
        toy.params, toy.frozen, toy.batch["safe"], k_lower
    )
    upper_loss = gift.make_upper_loss(toy.denoiser, gift.Gift())
    upper, _ = jax.jit(jax.grad(upper_loss, has_aux=True))(
        toy.params, toy.frozen, toy.batch["harmful"], k_upper
    )
    assert norm(lower) > 1e-2 and norm(upper) > 1e-2
    expected = jax.tree.map(lambda u, v: u + 0.7 * v, upper, lower)
    assert_close(difference(toy.params, new.params), expected, 1e-4, 1e-6)
    np.testing.assert_allclose(metrics["upper/grad_norm"], norm(expected), rtol=1e-5)
    assert set(metrics) >= {"lower/loss", "upper/loss", "upper/harmful_loss"}


# --- partition ------------------------------------------------------------------------


@pytest.mark.parametrize("rule, count", [("cross_attention_kv", 2), ("attention", 5)])
def test_other_partitions_train_their_own_parameters(toy, rule, count):
    params = toy_denoiser.params()
    trainable, frozen = select_trainable(params, rule)
    step = gift.make_step(toy.denoiser, gift.Gift(), optax.sgd(0.1), optax.sgd(0.1))
    state = toy.__class__(toy.denoiser, trainable, {}, {}).state(
        optax.sgd(0.1), optax.sgd(0.1)
    )
    new, _ = jax.jit(step)(state, {"network": frozen}, toy.batch, KEY)
    changed = [p for p in new.params if norm(new.params[p] - params[p]) > 0]
    assert len(changed) == count == len(new.params)


# --- fields ---------------------------------------------------------------------------


def test_representation_noising_needs_a_layer():
    gift.Gift(beta=0.0, layers=()).check("config.gift")
    with pytest.raises(UserError, match="config.gift.layers is empty.*gift.beta=0"):
        gift.Gift(layers=()).check("config.gift")


@pytest.mark.parametrize(
    "gradient, fields, message",
    [
        ("joint", {"grad_accum_steps": 2}, "grad_accum_steps=2 needs gradient=first"),
        ("unrolled", {"attention": "flash"}, "attention=flash has no second deriv"),
        ("unrolled", {"attention": "cudnn"}, "attention=cudnn has no second deriv"),
    ],
)
def test_hardware_that_a_gradient_does_not_work_with_is_refused(
    gradient, fields, message
):
    s, hardware = gift.Gift(gradient=gradient), setup.Hardware(**fields)
    with pytest.raises(UserError, match=f"^config.hardware.{message}.*set --config"):
        gift.check_hardware(s, hardware)
    gift.check_hardware(gift.Gift(), hardware)
