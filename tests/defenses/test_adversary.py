# SPDX-License-Identifier: Apache-2.0
"""The adversary in the loop: what it simulates, and the gradients taken after it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict

from gift_jax.attacks import lora
from gift_jax.defenses import adversary, gift

KEY = jax.random.key(7)
FULL = adversary.Settings(
    kinds=("full",),
    steps_min=2,
    steps_max=2,
    lr_min=0.03,
    lr_max=0.03,
    lora_lr_min=0.03,
    lora_lr_max=0.03,
    rank=2,
    alpha=2.0,
)
LORA = dataclasses.replace(FULL, kinds=("lora",))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def whole(toy):
    return {**toy.frozen["unet"], **toy.params}


def simulate(toy, s, key=KEY):
    run = jax.jit(adversary.make_simulate(toy.denoiser, s))
    return run(whole(toy), toy.frozen["abar"], toy.batch["harmful"], key)


def loss_of(toy, unet, key=KEY):
    nested = unflatten_dict(unet, sep="/")
    found, _ = toy.denoiser.losses(
        nested, toy.frozen["abar"], toy.batch["harmful"], key
    )
    return float(jnp.mean(found))


@pytest.mark.parametrize("s", [FULL, LORA], ids=["full", "lora"])
def test_attack_lowers_the_loss_on_its_pairs(toy, s):
    attacked = simulate(toy, dataclasses.replace(s, steps_min=8, steps_max=8))
    keys = jax.random.split(jax.random.key(1), 8)
    before = np.mean([loss_of(toy, whole(toy), k) for k in keys])
    after = np.mean([loss_of(toy, attacked, k) for k in keys])
    assert after < before - 0.02


def test_full_moves_everything_and_lora_the_attention_only(toy):
    moved = {}
    for name, s in (("full", FULL), ("lora", LORA)):
        attacked = simulate(toy, s)
        moved[name] = {k for k, v in whole(toy).items() if (attacked[k] != v).any()}
    assert moved["full"] == set(whole(toy))
    assert moved["lora"] == {k for k in whole(toy) if "/attn" in k}


def test_full_attack_equals_adam_written_out(toy):
    """Adam of Kingma & Ba 2015, algorithm 1, in NumPy, at the keys that are drawn."""
    attacked = simulate(toy, FULL)
    k_attack = jax.random.split(KEY, 4)[3]
    keys = jax.random.split(k_attack, 2)

    def loss_fn(unet, key):
        nested = unflatten_dict(unet, sep="/")
        args = nested, toy.frozen["abar"], toy.batch["harmful"], key
        return jnp.mean(toy.denoiser.losses(*args)[0])

    unet = {k: np.asarray(v, np.float64) for k, v in whole(toy).items()}
    m = {k: 0.0 for k in unet}
    v = {k: 0.0 for k in unet}
    for i, key in enumerate(keys):
        grads = jax.grad(loss_fn)({k: jnp.float32(w) for k, w in unet.items()}, key)
        for name, g in grads.items():
            g = np.asarray(g, np.float64)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g**2
            m_hat, v_hat = (
                m[name] / (1 - 0.9 ** (i + 1)),
                v[name] / (1 - 0.999 ** (i + 1)),
            )
            unet[name] = unet[name] - 0.03 * m_hat / (np.sqrt(v_hat) + 1e-8)
    for name in unet:
        np.testing.assert_allclose(attacked[name], unet[name], atol=2e-5)


def test_number_of_updates_kind_and_rate_are_drawn_from_their_ranges(toy):
    still = dataclasses.replace(FULL, steps_min=0, steps_max=2, lr_min=1e-3, lr_max=0.3)
    sizes = []
    for seed in range(12):
        attacked = simulate(toy, still, jax.random.key(seed))
        path = "block/proj_in/kernel"
        sizes.append(float(np.abs(attacked[path] - toy.frozen["unet"][path]).max()))
    assert min(sizes) == 0.0  # some draws have no update at all
    moved = sorted(size for size in sizes if size)
    assert 1e-4 < moved[0] and moved[-1] > 5 * moved[0]
    both = dataclasses.replace(LORA, kinds=("full", "lora"))
    paths = "block/proj_in/kernel", "block/attn1/to_q/kernel"
    kinds = set()
    for seed in range(8):  # full and lora have ranges of their own
        attacked = simulate(toy, both, jax.random.key(seed))
        kinds.add(tuple(bool((attacked[p] != whole(toy)[p]).any()) for p in paths))
    assert kinds == {(True, True), (False, True)}


def upper(toy, s, **settings):
    loss = gift.make_upper_loss(toy.denoiser, gift.Settings(attack=s, **settings))
    return lambda params, key=KEY: loss(params, toy.frozen, toy.batch["harmful"], key)


def test_first_order_gradient_is_that_at_the_attacked_parameters(toy):
    at_the_end = jax.jit(jax.grad(upper(toy, FULL, beta=0.3, cap=100.0), has_aux=True))
    grads, _ = at_the_end(toy.params)
    attacked = simulate(toy, FULL, jax.random.fold_in(KEY, 1))
    frozen = toy.frozen | {"unet": {k: attacked[k] for k in toy.frozen["unet"]}}
    plain = gift.make_upper_loss(toy.denoiser, gift.Settings(beta=0.3, cap=100.0))
    there = {k: attacked[k] for k in toy.params}
    args = frozen, toy.batch["harmful"], KEY
    expected, _ = jax.jit(jax.grad(plain, has_aux=True))(there, *args)
    here, _ = jax.jit(jax.grad(plain, has_aux=True))(
        toy.params, toy.frozen, toy.batch["harmful"], KEY
    )
    for name in grads:
        np.testing.assert_allclose(grads[name], expected[name], atol=1e-5)
    assert any(np.abs(grads[n] - here[n]).max() > 1e-2 for n in grads)


@pytest.mark.parametrize("s", [FULL, LORA], ids=["full", "lora"])
def test_unrolled_gradient_equals_finite_differences(x64, toy_factory, s):
    toy = toy_factory(np.float64, 4)
    unrolled = dataclasses.replace(s, unrolled=True)
    value = upper(toy, unrolled, beta=0.0, cap=100.0)
    fast = jax.jit(lambda params: value(params)[0])
    grads, _ = jax.jit(jax.grad(value, has_aux=True))(toy.params)
    plain, _ = jax.jit(jax.grad(upper(toy, s, beta=0.0, cap=100.0), has_aux=True))(
        toy.params
    )
    rng = np.random.default_rng(0)
    along = {p: rng.normal(size=g.shape) for p, g in grads.items()}
    h = 1e-7
    up, down = (
        fast({p: toy.params[p] + step * along[p] for p in along}) for step in (h, -h)
    )
    numeric = float(up - down) / (2 * h)
    exact, first_order = (
        sum(np.vdot(g[p], along[p]) for p in along) for g in (grads, plain)
    )
    np.testing.assert_allclose(exact, numeric, rtol=2e-4)
    assert abs(first_order - numeric) > 1e-2 * abs(numeric)


def test_safe_counterpart_is_a_term_of_the_lower_level(toy):
    weighted = gift.Settings(attack=dataclasses.replace(FULL, safe_weight=0.7))
    args = toy.params, toy.frozen, toy.batch["safe"], KEY
    plain, _ = gift.make_lower_loss(toy.denoiser, gift.Settings())(*args)
    total, metrics = gift.make_lower_loss(toy.denoiser, weighted)(*args)
    learned = metrics["lower/learned_loss"]
    assert learned > 1e-2
    np.testing.assert_allclose(total, plain + 0.7 * learned, rtol=1e-5)
    none = gift.Settings(attack=dataclasses.replace(FULL, safe_weight=0.0))
    np.testing.assert_array_equal(
        gift.make_lower_loss(toy.denoiser, none)(*args)[0], plain
    )


def test_no_adversary_changes_nothing(toy):
    state, step = toy.step(cap=100.0)
    idle = dataclasses.replace(FULL, kinds=())
    other, same_step = toy.step(cap=100.0, attack=idle)
    new, _ = step(state, toy.frozen, toy.batch, KEY)
    same, _ = same_step(other, toy.frozen, toy.batch, KEY)
    jax.tree.map(np.testing.assert_array_equal, new.params, same.params)


@pytest.mark.parametrize("gradient", gift.GRADIENTS)
def test_adversary_composes_with_every_gradient(toy, gradient):
    both = dataclasses.replace(LORA, kinds=("full", "lora"))
    state, step = toy.step(cap=100.0, gradient=gradient, attack=both)
    new, metrics = step(state, toy.frozen, toy.batch, KEY)
    assert np.isfinite(float(metrics["upper/loss"]))
    assert {"lower/learned_loss", "upper/malicious_loss"} <= set(metrics)
    assert any((new.params[k] != toy.params[k]).any() for k in toy.params)


def test_lora_simulated_is_the_attacks_own(toy):
    """With no update the factors' product is zero: the UNet as it was."""
    still = dataclasses.replace(
        LORA, steps_min=0, steps_max=1, lora_lr_min=1e-30, lora_lr_max=1e-30
    )
    attacked = simulate(toy, still)
    for name, array in whole(toy).items():
        np.testing.assert_array_equal(attacked[name], array)
    factors = lora.init(KEY, whole(toy), 2)
    assert set(factors) == {k for k in whole(toy) if "/attn" in k}


# --- an attack that goes on from step to step -----------------------------------------

PURSUED = dataclasses.replace(FULL, horizon=4, safe_weight=0.0)


def pursued(toy, s, count):
    """The first state and those after each of `count` steps with an attacker."""
    tx = optax.sgd(0.0)
    state, step = toy.step(tx, tx, cap=100.0, attack=s)
    attacker = adversary.init_attacker(whole(toy))
    state = state.replace(opt=state.opt | {"attacker": attacker})
    states = [state]
    for _ in range(count):
        states.append(step(states[-1], toy.frozen, toy.batch, KEY)[0])
    return states


def test_attack_goes_on_until_it_starts_anew(toy):
    """Without training, the shift grows, and now and then is that of a first step."""
    states = pursued(toy, PURSUED, 24)
    path = "block/proj_in/kernel"
    counts = [int(state.opt["attacker"]["opt"].count) for state in states]
    sizes = [
        float(np.abs(state.opt["attacker"]["shift"][path]).max()) for state in states
    ]
    assert counts[0] == 0 and sizes[0] == 0.0
    assert all(b in (a + 2, 2) for a, b in zip(counts, counts[1:], strict=False))
    fresh = counts[1:].count(2)
    assert 2 <= fresh <= 14  # every fourth step on average
    assert max(counts) >= 6
    assert max(sizes) > 1.5 * min(sizes[1:])
    long = dataclasses.replace(PURSUED, horizon=10**6)
    counts = [int(s.opt["attacker"]["opt"].count) for s in pursued(toy, long, 6)]
    assert counts == [0, 2, 4, 6, 8, 10, 12]


def test_long_attack_is_adam_from_where_the_model_stands(toy):
    """Two steps of two updates are the four that the attack alone takes."""
    s = dataclasses.replace(PURSUED, horizon=10**6)
    shift = pursued(toy, s, 2)[-1].opt["attacker"]["shift"]
    unet, adam = whole(toy), optax.adam(0.03)
    opt = adam.init(unet)
    for step in range(2):
        _, k_upper = jax.random.split(jax.random.fold_in(KEY, step))
        k_attack = jax.random.split(jax.random.fold_in(k_upper, 1), 4)[3]
        for k in jax.random.split(k_attack, 2):

            def loss_fn(unet, k=k):
                nested = unflatten_dict(unet, sep="/")
                args = nested, toy.frozen["abar"], toy.batch["harmful"], k
                return jnp.mean(toy.denoiser.losses(*args)[0])

            updates, opt = adam.update(jax.grad(loss_fn)(unet), opt)
            unet = optax.apply_updates(unet, updates)
    for name, start in whole(toy).items():
        assert np.abs(unet[name] - start).max() > 0.05
        np.testing.assert_allclose(shift[name], unet[name] - start, atol=2e-5)


def test_upper_level_is_taken_where_the_long_attack_has_led(toy):
    s = dataclasses.replace(PURSUED, horizon=10**6)
    sgd = optax.sgd(1.0)
    state, step = toy.step(optax.sgd(0.0), sgd, cap=100.0, beta=0.0, attack=s)
    attacker = adversary.init_attacker(whole(toy))
    state = state.replace(opt=state.opt | {"attacker": attacker})
    new, _ = step(state, toy.frozen, toy.batch, KEY)
    shift = new.opt["attacker"]["shift"]
    _, k_upper = jax.random.split(jax.random.fold_in(KEY, 0))
    plain = gift.make_upper_loss(toy.denoiser, gift.Settings(beta=0.0, cap=100.0))
    frozen = {n: a + shift[n] for n, a in toy.frozen["unet"].items()}
    there = {n: a + shift[n] for n, a in toy.params.items()}
    grads, here = (
        jax.grad(plain, has_aux=True)(
            params, toy.frozen | {"unet": rest}, toy.batch["harmful"], k_upper
        )[0]
        for params, rest in ((there, frozen), (toy.params, toy.frozen["unet"]))
    )
    assert any(np.abs(grads[n] - here[n]).max() > 1e-2 for n in grads)
    for name, start in toy.params.items():
        np.testing.assert_allclose(start - new.params[name], grads[name], atol=1e-5)
