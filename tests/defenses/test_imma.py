# SPDX-License-Identifier: Apache-2.0
"""IMMA: which parameters each level moves, where to, and by how much."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_denoiser
from flax.traverse_util import unflatten_dict

from gift_jax.attacks import lora
from gift_jax.defenses import imma
from gift_jax.runtime.errors import UserError
from gift_jax.state import init_state

KEY = jax.random.key(3)


def start(toy, tx_lower, tx_upper, **settings):
    """(state, jitted step) with psi the cross-attention."""
    s = imma.Imma(**settings)
    params, frozen = toy.network, {"network": {}}
    if s.inner_attack == "lora":
        random = lora.init(
            jax.random.key(9), toy.network, s.rank, toy_denoiser.LORA_TARGETS
        )
        factors = imma.flat_factors(random)
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


def harmful_loss(toy, network, key):
    nested = unflatten_dict(network, sep="/")
    return jnp.mean(toy.denoiser.losses(nested, toy.batch["harmful"], key)[0])


@pytest.mark.parametrize("inner_attack", imma.INNER_ATTACKS)
def test_each_level_moves_its_own_parameters(toy, inner_attack):
    still, sgd = optax.sgd(0.0), optax.sgd(0.1)
    for tx_lower, tx_upper, expected in (
        (sgd, still, "lower"),
        (still, sgd, "upper"),
        (still, still, None),
    ):
        state, step, frozen = start(toy, tx_lower, tx_upper, inner_attack=inner_attack)
        new, _ = step(state, frozen, toy.batch, KEY)
        names = moved(state.params, new.params)
        if expected == "lower" and inner_attack == "lora":
            assert names and all(name.startswith("lora:") for name in names)
        elif expected == "lower":
            assert names == set(toy.network)
        elif expected == "upper":
            assert names == set(toy.params)
        else:
            assert not names
        exported = imma.DEFENSE.exported(new.params, tuple(toy.params))
        assert set(exported) == set(toy.params)


def test_step_is_a_descent_then_an_ascent_written_out(toy):
    """Equation 4 of IMMA with one SGD step a level, gradients by hand-written calls."""
    state, step, frozen = start(toy, optax.sgd(0.05), optax.sgd(0.2))
    new, metrics = step(state, frozen, toy.batch, KEY)
    k_lower, k_upper = jax.random.split(jax.random.fold_in(KEY, 0))
    value, g = jax.value_and_grad(lambda u: harmful_loss(toy, u, k_lower))(toy.network)
    unet = {n: w - 0.05 * g[n] for n, w in toy.network.items()}
    after, g = jax.value_and_grad(lambda u: harmful_loss(toy, u, k_upper))(unet)
    unet = {n: w + 0.2 * g[n] if n in toy.params else w for n, w in unet.items()}
    np.testing.assert_allclose(metrics["lower/harmful_loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["upper/harmful_loss"], after, rtol=1e-5)
    for name in unet:
        np.testing.assert_allclose(new.params[name], unet[name], atol=1e-5)


def test_lora_lower_level_descends_through_the_factors(toy):
    tx = optax.sgd(0.5)
    state, step, frozen = start(
        toy, tx, optax.sgd(0.0), inner_attack="lora", rank=2, alpha=2.0
    )
    first = None
    for _ in range(60):
        state, metrics = step(state, frozen, toy.batch, KEY)
        first = metrics["lower/harmful_loss"] if first is None else first
    assert not moved(toy.params, imma.network_part(state.params))
    keys = jax.random.split(jax.random.key(1), 8)
    factors = imma._factors(state.params)
    tuned = lora.apply(toy.network, factors, 1.0)
    before = np.mean([harmful_loss(toy, toy.network, k) for k in keys])
    after = np.mean([harmful_loss(toy, tuned, k) for k in keys])
    assert after < before - 0.02


def test_hinge_stops_the_ascent_that_raw_does_not(toy):
    def after(**settings):
        state, step, frozen = start(toy, optax.sgd(0.0), optax.sgd(0.2), **settings)
        new, _ = step(state, frozen, toy.batch, KEY)
        return moved(state.params, new.params)

    assert after()
    assert not after(ascent_bound="hinge", ascent_cap=0.0)


def test_levels_share_their_pairs():
    imma.Imma(inner_steps=2, outer_steps=4).check("config.imma")
    with pytest.raises(UserError, match="inner_steps=2 and outer_steps=3 share their"):
        imma.Imma(inner_steps=2, outer_steps=3).check("config.imma")
