# SPDX-License-Identifier: Apache-2.0
"""DreamBooth's step: what trains, prior preservation, the text encoder in it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_denoiser
from flax.traverse_util import unflatten_dict

from gift_jax.attacks import dreambooth
from gift_jax.state import init_state

KEY = jax.random.key(4)
TABLE = "text_model/table"


def start(params, tx):
    return init_state(params, {"attack": tx.init(params)})


def encode(text, ids):
    return {"states": text["text_encoder"]["text_model"]["table"][ids]}


def taken(params, batch, tx=None, **options):
    """Returns (state after a step, metrics) of the toy model."""
    tx = tx or optax.sgd(0.1)
    step = dreambooth.make_step(toy_denoiser.denoiser(), tx, **options)
    return jax.jit(step)(start(params, tx), {}, batch, KEY)


@pytest.fixture
def batch():
    """Instance and prior pairs, of different numbers."""
    return {
        "data": toy_denoiser.batch(4),
        "prior": toy_denoiser.batch(2, seed=1),
    }


def test_step_trains_every_parameter_of_the_unet(batch):
    params = toy_denoiser.params()
    new, metrics = taken(params, batch)
    assert set(metrics) == {"attack/loss", "attack/grad_norm"}
    for path, before in params.items():
        assert np.abs(new.params[path] - before).max() > 1e-5, path


def test_prior_loss_is_added_with_its_weight_each_a_mean_of_its_own(batch):
    params = toy_denoiser.params()
    tx = optax.sgd(1.0)
    alone, _ = taken(params, batch, tx)
    _, metrics = taken(params, batch, tx, prior_weight=0.5)
    instance, prior = (
        float(metrics[f"attack/{n}_loss"]) for n in ("instance", "prior")
    )
    assert abs(instance - prior) > 1e-2
    np.testing.assert_allclose(
        metrics["attack/loss"], instance + 0.5 * prior, rtol=1e-6
    )
    one, _ = taken(params, batch, tx, prior_weight=1.0)
    two, _ = taken(params, batch, tx, prior_weight=2.0)
    differs = 0.0
    for path in params:  # SGD at rate 1: each step is minus the gradient
        first = one.params[path] - alone.params[path]
        second = two.params[path] - one.params[path]
        np.testing.assert_allclose(first, second, atol=1e-5)
        differs = max(differs, float(np.abs(first).max()))
    assert differs > 1e-3
    # a mean: the same pairs twice weigh no more
    doubled = jax.tree.map(lambda a: jnp.concatenate([a, a]), batch["prior"])
    _, again = taken(params, batch | {"prior": doubled}, prior_weight=0.5)
    assert float(again["attack/prior_loss"]) < 1.6 * prior


def test_text_encoder_trains_through_the_ids(batch, rng):
    table = jnp.asarray(rng.normal(size=(7, toy_denoiser.D)), jnp.float32)
    ids = jnp.asarray([[1, 2, 3]] * 4)
    pairs = {k: v for k, v in batch["data"].items() if k != "cond"} | {"ids": ids}
    params = toy_denoiser.params() | {TABLE: table}
    new, metrics = taken(params, {"data": pairs}, encode_ids=encode)
    moved = np.abs(new.params[TABLE] - table).max(axis=1)
    assert (moved[1:4] > 0).all() and not moved[[0, 4, 5, 6]].any()
    unet = unflatten_dict({k: v for k, v in params.items() if k != TABLE}, sep="/")
    k_instance, _ = jax.random.split(jax.random.fold_in(KEY, 0))
    losses = toy_denoiser.denoiser().losses(
        unet, pairs | {"cond": {"states": table[ids]}}, k_instance
    )[0]
    np.testing.assert_allclose(metrics["attack/loss"], losses.mean(), rtol=1e-5)


def test_outliers_are_removed_and_nothing_else(rng):
    usual = rng.normal(size=(40, 40)).astype(np.float32)
    usual[:20] = 0.0  # as unused channels are; they do not count
    large = usual.copy()
    large[30, 5:9] = (50.0, -200.0, 9.0, 1000.0)
    params = {"usual": usual, "large": large, "empty": np.zeros(3, np.float32)}
    new = dreambooth.without_outliers(params, 30.0)
    for name in ("usual", "empty"):
        np.testing.assert_array_equal(new[name], params[name])
    assert new["large"][30, 5:9].tolist() == [0.0, 0.0, 9.0, 0.0]
    rest = np.ones(large.shape, bool)
    rest[30, 5:9] = False
    np.testing.assert_array_equal(new["large"][rest], large[rest])
