# SPDX-License-Identifier: Apache-2.0
"""IMMA: which parameters each level moves, where to, and by how much."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict

from gift_jax.attacks import lora
from gift_jax.defenses import imma
from gift_jax.state import init_state

KEY = jax.random.key(3)


def whole(toy):
    return {**toy.frozen["unet"], **toy.params}


def start(toy, tx_lower, tx_upper, **settings):
    """(state, jitted step) with psi the cross-attention."""
    s = imma.Settings(**settings)
    params, frozen = whole(toy), toy.frozen | {"unet": {}}
    if s.lower == "lora":
        factors = imma.flat_factors(lora.init(jax.random.key(9), whole(toy), s.rank))
        params, frozen = {**toy.params, **factors}, toy.frozen
    psi = tuple(toy.params)
    parts = {"lower": imma.lower_part(params), "upper": psi}
    tx = {"lower": tx_lower, "upper": tx_upper}
    opt = {k: tx[k].init({n: params[n] for n in parts[k]}) for k in tx}
    params = jax.tree.map(jnp.array, params)
    step = imma.make_step(toy.denoiser, s, psi, tx_lower, tx_upper)
    return init_state(params, opt), jax.jit(step), frozen


def moved(old, new):
    return {name for name in old if (old[name] != new[name]).any()}


def malicious_loss(toy, unet, key):
    nested = unflatten_dict(unet, sep="/")
    args = nested, toy.frozen["abar"], toy.batch["harmful"], key
    return jnp.mean(toy.denoiser.losses(*args)[0])


@pytest.mark.parametrize("lower", imma.LOWER)
def test_each_level_moves_its_own_parameters(toy, lower):
    still, sgd = optax.sgd(0.0), optax.sgd(0.1)
    for tx_lower, tx_upper, expected in (
        (sgd, still, "lower"),
        (still, sgd, "upper"),
        (still, still, None),
    ):
        state, step, frozen = start(toy, tx_lower, tx_upper, lower=lower)
        new, _ = step(state, frozen, toy.batch, KEY)
        names = moved(state.params, new.params)
        if expected == "lower" and lower == "lora":
            assert names and all(name.startswith("lora:") for name in names)
        elif expected == "lower":
            assert names == set(whole(toy))
        elif expected == "upper":
            assert names == set(toy.params)
        else:
            assert not names
        assert set(imma.trained(new.params, tuple(toy.params))) == set(toy.params)


def test_step_is_a_descent_then_an_ascent_written_out(toy):
    """Equation 4 of IMMA with one SGD step a level, gradients by hand-written calls."""
    state, step, frozen = start(toy, optax.sgd(0.05), optax.sgd(0.2))
    new, metrics = step(state, frozen, toy.batch, KEY)
    k_lower, k_upper = jax.random.split(jax.random.fold_in(KEY, 0))
    value, g = jax.value_and_grad(lambda u: malicious_loss(toy, u, k_lower))(whole(toy))
    unet = {n: w - 0.05 * g[n] for n, w in whole(toy).items()}
    after, g = jax.value_and_grad(lambda u: malicious_loss(toy, u, k_upper))(unet)
    unet = {n: w + 0.2 * g[n] if n in toy.params else w for n, w in unet.items()}
    np.testing.assert_allclose(metrics["lower/malicious_loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["upper/malicious_loss"], after, rtol=1e-5)
    for name in unet:
        np.testing.assert_allclose(new.params[name], unet[name], atol=1e-5)


def test_lora_lower_level_descends_through_the_factors(toy):
    tx = optax.sgd(0.5)
    state, step, frozen = start(
        toy, tx, optax.sgd(0.0), lower="lora", rank=2, alpha=2.0
    )
    first = None
    for _ in range(60):
        state, metrics = step(state, frozen, toy.batch, KEY)
        first = metrics["lower/malicious_loss"] if first is None else first
    assert moved(toy.params, imma.trained(state.params, tuple(toy.params))) == set()
    keys = jax.random.split(jax.random.key(1), 8)
    factors = imma._factors(state.params)
    tuned = lora.apply(whole(toy), factors, 1.0)
    before = np.mean([malicious_loss(toy, whole(toy), k) for k in keys])
    after = np.mean([malicious_loss(toy, tuned, k) for k in keys])
    assert after < before - 0.02


def test_hinge_stops_the_ascent_that_raw_does_not(toy):
    def after(**settings):
        state, step, frozen = start(toy, optax.sgd(0.0), optax.sgd(0.2), **settings)
        new, _ = step(state, frozen, toy.batch, KEY)
        return moved(state.params, new.params)

    assert after(bound="raw")
    assert not after(bound="hinge", cap=0.0)
