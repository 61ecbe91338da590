# SPDX-License-Identifier: Apache-2.0
"""GIFT with an attacker in the loop: the attack, and the levels taken beside it."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict

from gift_jax.defenses import gift
from gift_jax.defenses import gift_adversarial as adversarial
from gift_jax.runtime.errors import UserError
from gift_jax.state import make_update, repeat_update

KEY = jax.random.key(7)
ATTACKER = adversarial.Attacker(
    restart_every=10**6, steps_min=2, steps_max=2, lr_min=0.03, lr_max=0.03
)
OTHER_PATHS = ("block/proj_in/kernel", "block/attn1/to_q/kernel")


def loss_of(toy, network, key):
    nested = unflatten_dict(network, sep="/")
    return jnp.mean(toy.denoiser.losses(nested, toy.batch["harmful"], key)[0])


@functools.cache
def continue_attack(denoiser, s):
    return jax.jit(adversarial.make_continue_attack(denoiser, s))


def attack(toy, s, keys):
    """The attackers after each call on a model that stays as it is, the first fresh."""
    attackers = [adversarial.init_attacker(toy.network)]
    for key in keys:
        args = attackers[-1], toy.network, toy.batch["harmful"], key
        attackers.append(continue_attack(toy.denoiser, s)(*args))
    return attackers


def counts_of(attackers):
    return [int(attacker["opt"].count) for attacker in attackers]


# --- the attacker ---------------------------------------------------------------------


def test_attack_lowers_the_loss_of_its_pairs_by_every_parameter(toy):
    last = attack(toy, ATTACKER, jax.random.split(KEY, 5))[-1]
    attacked = adversarial.apply_delta(toy.network, last["delta"])
    keys = jax.random.split(jax.random.key(1), 8)
    before = np.mean([loss_of(toy, toy.network, k) for k in keys])
    after = np.mean([loss_of(toy, attacked, k) for k in keys])
    assert after < before - 0.02
    assert all((attacked[path] != toy.network[path]).any() for path in attacked)


def test_long_attack_is_adam_from_where_the_model_stands(toy):
    """Two calls of two updates are the four of Kingma & Ba 2015, algorithm 1."""
    calls = jax.random.split(KEY, 2)
    delta = attack(toy, ATTACKER, calls)[-1]["delta"]
    grad = jax.jit(jax.grad(lambda network, key: loss_of(toy, network, key)))
    network = {path: np.asarray(a, np.float64) for path, a in toy.network.items()}
    m, v = dict.fromkeys(network, 0.0), dict.fromkeys(network, 0.0)
    keys = [k for call in calls for k in jax.random.split(attack_key(call), 2)]
    for i, key in enumerate(keys):
        grads = grad({path: jnp.float32(a) for path, a in network.items()}, key)
        for path, g in grads.items():
            g = np.asarray(g, np.float64)
            m[path] = 0.9 * m[path] + 0.1 * g
            v[path] = 0.999 * v[path] + 0.001 * g**2
            mean, square = (
                m[path] / (1 - 0.9 ** (i + 1)),
                v[path] / (1 - 0.999 ** (i + 1)),
            )
            network[path] = network[path] - 0.03 * mean / (np.sqrt(square) + 1e-8)
    for path, start in toy.network.items():
        change = network[path] - np.asarray(start, np.float64)
        assert np.abs(change).max() > 0.05
        np.testing.assert_allclose(delta[path], change, atol=2e-5)


def attack_key(call_key):
    """Of a call's key, the one that its updates' keys are split from."""
    return jax.random.split(call_key, 4)[3]


def test_attack_goes_on_until_it_starts_anew(toy):
    short = dataclasses.replace(ATTACKER, restart_every=4)
    attackers = attack(toy, short, jax.random.split(KEY, 24))
    counts = counts_of(attackers)
    sizes = [float(np.abs(a["delta"][OTHER_PATHS[0]]).max()) for a in attackers]
    assert counts[0] == 0 and sizes[0] == 0.0
    assert all(b in (a + 2, 2) for a, b in itertools.pairwise(counts))
    assert 2 <= counts[1:].count(2) <= 14  # every fourth call on average
    assert max(counts) >= 6
    assert max(sizes) > 1.5 * min(sizes[1:])
    long = attack(toy, ATTACKER, jax.random.split(KEY, 6))
    assert counts_of(long) == [0, 2, 4, 6, 8, 10, 12]


def test_number_of_updates_and_rate_are_drawn_from_their_ranges(toy):
    wide = dataclasses.replace(ATTACKER, steps_min=0, lr_min=1e-3, lr_max=0.3)
    sizes, counts = [], set()
    for key in jax.random.split(jax.random.key(1), 12):
        last = attack(toy, wide, [key])[-1]
        sizes.append(float(np.abs(last["delta"][OTHER_PATHS[0]]).max()))
        counts.add(counts_of([last])[0])
    assert counts == {0, 1, 2}
    moved = sorted(size for size in sizes if size)
    assert len(moved) < len(sizes)  # some draws have no update at all
    assert moved[0] > 1e-4 and moved[-1] > 5 * moved[0] and moved[-1] < 0.7


# --- the levels -----------------------------------------------------------------------


def start(toy, tx_lower=None, tx_upper=None, **settings):
    """(state, frozen, jitted step) with SGD where no optimizer is given."""
    tx_lower, tx_upper = tx_lower or optax.sgd(0.1), tx_upper or optax.sgd(0.1)
    s = adversarial.GiftAdversarial(**{"attacker": ATTACKER} | settings)
    lower_loss = adversarial.make_lower_loss(toy.denoiser, s.lower_target)
    upper_loss = adversarial.make_upper_loss(toy.denoiser, s)
    step = adversarial.make_step(
        repeat_update(make_update("lower", lower_loss, tx_lower), s.inner_steps),
        repeat_update(make_update("upper", upper_loss, tx_upper), s.outer_steps),
        adversarial.make_continue_attack(toy.denoiser, s.attacker),
        s.lower_loss_limit,
    )
    state = toy.state(tx_lower, tx_upper)
    attacker = adversarial.init_attacker(toy.network)
    state = state.replace(opt=state.opt | {"attacker": attacker})
    return state, toy.frozen | {"original": toy.params}, jax.jit(step)


def difference(a, b):
    return {path: np.asarray(a[path] - b[path]) for path in b}


def largest(arrays):
    return max(float(np.abs(a).max()) for a in arrays.values())


def test_lower_level_asks_for_what_the_original_predicts(toy):
    frozen = toy.frozen | {"original": toy.params}
    args = frozen, toy.batch["safe"], KEY
    lower_loss = adversarial.make_lower_loss(toy.denoiser, "model")
    loss = jax.jit(jax.value_and_grad(lower_loss, has_aux=True))
    (value, _), grads = loss(toy.params, *args)
    assert float(value) == 0 and largest(grads) == 0
    moved = jax.tree.map(lambda a: a + 0.1, toy.params)
    (value, metrics), grads = loss(moved, *args)
    of_data = adversarial.make_lower_loss(toy.denoiser, "data")(moved, *args)[0]
    published = gift.make_lower_loss(toy.denoiser)(moved, *args)[0]
    assert float(of_data) == float(published)
    assert float(value) == float(metrics["lower/loss"]) > 1e-3
    assert float(value) != pytest.approx(float(of_data), rel=0.01)
    back = jax.tree.map(lambda a, g: a - 1e-3 * g / largest(grads), moved, grads)
    assert float(loss(back, *args)[0][0]) < float(value)


def test_upper_level_is_taken_where_the_attack_has_led(toy):
    still, sgd = optax.sgd(0.0), optax.sgd(1.0)
    state, frozen, step = start(toy, still, sgd, beta=0.3)
    new, _ = step(state, frozen, toy.batch, KEY)
    delta = new.opt["attacker"]["delta"]
    _, k_upper = jax.random.split(jax.random.fold_in(KEY, 0))
    call = adversarial.init_attacker(toy.network), toy.network, toy.batch["harmful"]
    expected = continue_attack(toy.denoiser, ATTACKER)(
        *call, jax.random.fold_in(k_upper, 1)
    )
    for path in delta:
        np.testing.assert_allclose(delta[path], expected["delta"][path], atol=1e-6)

    published = gift.make_upper_loss(toy.denoiser, gift.Gift(beta=0.3))
    grad = jax.jit(jax.grad(published, has_aux=True))
    attacked = adversarial.apply_delta(toy.network, delta)
    rest = {"network": {path: attacked[path] for path in toy.frozen["network"]}}
    there = {path: attacked[path] for path in toy.params}
    pairs = toy.batch["harmful"], k_upper
    at_the_end, here = grad(there, rest, *pairs)[0], grad(toy.params, frozen, *pairs)[0]
    assert largest(difference(at_the_end, here)) > 1e-2
    for path, before in toy.params.items():
        step_taken = before - new.params[path]
        np.testing.assert_allclose(step_taken, at_the_end[path], atol=1e-5)


def test_attacker_that_stands_still_leaves_the_published_step(toy):
    still = dataclasses.replace(ATTACKER, steps_min=0, lr_min=1e-30, lr_max=1e-30)
    state, frozen, step = start(toy, lower_target="data", attacker=still)
    published, published_step = toy.step()
    new, metrics = step(state, frozen, toy.batch, KEY)
    expected, other = published_step(published, toy.frozen, toy.batch, KEY)
    assert largest(difference(expected.params, toy.params)) > 1e-3
    for path, array in expected.params.items():
        np.testing.assert_allclose(new.params[path], array, atol=1e-6)
    assert set(metrics) == set(other)
    moving, *_ = start(toy, lower_target="data")[2](state, frozen, toy.batch, KEY)
    assert largest(difference(moving.params, expected.params)) > 1e-3


def test_update_scale_is_1_to_the_limit_and_0_from_twice_it():
    scales = [
        float(adversarial.update_scale(x, 2.0)) for x in (0.5, 2.0, 3.0, 4.0, 9.0)
    ]
    assert scales == [1.0, 1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("limit, scale", [(0.0, 1.0), (0.5, 1.0), (0.32, 0.75)])
def test_above_its_limit_the_lower_loss_holds_the_upper_level_back(toy, limit, scale):
    """Levels that move by -1 and +2; the attacker sees what the lower one left."""

    def lower(params, opt, frozen, batch, key):
        return jax.tree.map(lambda a: a - 1, params), opt, {"lower/loss": 0.4}

    def upper(params, opt, frozen, batch, key):
        after_lower = {path: toy.params[path] - 1 for path in params}
        jax.tree.map(np.testing.assert_array_equal, frozen["delta"], after_lower)
        return jax.tree.map(lambda a: a + 2, params), opt, {}

    def continue_attack(attacker, network, batch, key):
        assert batch is toy.batch["harmful"] and set(network) == set(toy.network)
        return {"delta": {path: network[path] for path in toy.params}, "opt": ()}

    state, frozen, _ = start(toy)
    step = adversarial.make_step(lower, upper, continue_attack, limit)
    new, metrics = step(state, frozen, toy.batch, KEY)
    assert ("upper/update_scale" in metrics) == bool(limit)
    np.testing.assert_allclose(metrics.get("upper/update_scale", 1), scale, rtol=1e-6)
    for path, before in toy.params.items():
        expected = before - 1 + 2 * scale
        np.testing.assert_allclose(new.params[path], expected, atol=1e-6)


# --- fields ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"gradient": "joint"}, "gradient=joint must be first_order"),
        ({"lower_loss_limit": 0.1, "inner_steps": 0}, "lower_loss_limit=0.1 needs a"),
        ({"layers": ()}, "layers is empty"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(UserError, match=rf"config\.g\.{message}"):
        adversarial.GiftAdversarial(**fields).check("config.g")


@pytest.mark.parametrize("fields", [{"steps_min": 2}, {"lr_min": 1.0}])
def test_a_range_that_ends_before_it_begins_is_refused(fields):
    message = rf"config\.a\.{next(iter(fields))}=.* must be at most"
    with pytest.raises(UserError, match=message):
        adversarial.Attacker(**fields).check("config.a")
