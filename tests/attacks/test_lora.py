# SPDX-License-Identifier: Apache-2.0
"""LoRA in parameter space: its start, its arithmetic, what its step changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_denoiser
from flax.traverse_util import flatten_dict, unflatten_dict

from gift_jax.attacks import lora
from gift_jax.runtime.errors import UserError
from gift_jax.state import init_state

KEY = jax.random.key(4)
KERNELS = {p for p in toy_denoiser.SHAPES if "/attn" in p}


@pytest.fixture
def unet():
    return toy_denoiser.params()


def init(unet, rank, *targets, key=KEY):
    return lora.init(key, unet, rank, toy_denoiser.LORA_TARGETS, *targets)


def random_factors(unet, rank, rng):
    """Factors after training: no B is zero."""
    factors = init(unet, rank)
    return jax.tree.map(
        lambda a: jnp.asarray(0.1 * rng.normal(size=a.shape), a.dtype), factors
    )


def test_factors_start_at_no_change(unet):
    factors = init(unet, 3)
    assert set(factors) == KERNELS
    for path, f in factors.items():
        wide, out = unet[path].shape
        assert (f["A"].shape, f["B"].shape) == ((wide, 3), (3, out))
        assert np.abs(f["A"]).max() > 0
        assert not f["B"].any()
    applied = lora.apply(unet, factors, 2.0)
    jax.tree.map(np.testing.assert_array_equal, applied, unet)


def test_factors_of_two_kernels_and_keys_differ():
    unet = {f"{name}/attn1/to_q/kernel": jnp.zeros((300, 4)) for name in "ab"}
    first, second = (f["A"] for f in init(unet, 4, ["to_q"]).values())
    assert not np.allclose(first, second)
    other = init(unet, 4, ["to_q"], key=jax.random.key(5))
    assert not np.allclose(first, other["a/attn1/to_q/kernel"]["A"])
    assert abs(float(jnp.std(first)) - 1 / 4) < 0.02  # of A: 1 / rank


def test_apply_adds_the_scaled_product(unet, rng):
    factors = random_factors(unet, 2, rng)
    alpha, rank = 6.0, 2
    applied = lora.apply(unet, factors, alpha / rank)
    for path, before in unet.items():
        expected = np.asarray(before, np.float64)
        if path in factors:
            A, B = (np.asarray(factors[path][n], np.float64) for n in "AB")
            assert np.abs(A @ B).max() > 1e-3
            expected = expected + alpha / rank * A @ B
        np.testing.assert_allclose(applied[path], expected, atol=1e-6)


def test_targets_choose_the_projections(unet):
    factors = init(unet, 2, ("to_k", "to_out_0"))
    names = {"block/attn2/to_k/kernel", "block/attn2/to_out_0/kernel"}
    assert set(factors) == names


def test_no_target_is_refused():
    with pytest.raises(UserError, match="config.lora.targets is empty; choose from to"):
        lora.Lora(targets=()).check("config.lora")


def test_step_trains_the_factors_only(unet):
    tx = optax.adam(1e-2)
    step = jax.jit(lora.make_step(toy_denoiser.denoiser(), tx, 0.5))
    factors = init(unet, 2)
    state = init_state(factors, {"attack": tx.init(factors)})
    frozen = {"network": unet}
    kept = jax.device_get(frozen)
    batch = {"data": toy_denoiser.batch(4)}
    losses = []
    for _ in range(3):
        state, metrics = step(state, frozen, batch, KEY)
        losses.append(float(metrics["attack/loss"]))
    assert int(state.step) == 3
    assert len(set(losses)) == 3  # noise of its own at each step
    assert step._cache_size() == 1
    for path, f in state.params.items():
        assert np.abs(f["B"]).max() > 0, path
        assert not np.array_equal(f["A"], factors[path]["A"]), path
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), kept)


def test_step_lowers_the_loss_on_the_attacked_pairs(unet):
    tx = optax.sgd(0.1)
    step = jax.jit(lora.make_step(toy_denoiser.denoiser(), tx, 1.0))
    factors = init(unet, 2)
    state = init_state(factors, {"attack": tx.init(factors)})
    frozen = {"network": unet}
    batch = {"data": toy_denoiser.batch(4)}
    new, before = step(state, frozen, batch, KEY)
    _, after = step(new.replace(step=state.step), frozen, batch, KEY)
    assert float(before["attack/grad_norm"]) > 1e-3
    assert float(after["attack/loss"]) < float(before["attack/loss"])


def test_merged_weights_predict_what_the_step_applied(tiny, rng):
    unet = flatten_dict(tiny.params["unet"], sep="/")
    factors = random_factors(unet, 4, rng)
    assert len(factors) == 3 * 2 * 4  # blocks, attentions, projections
    denoiser = tiny.denoiser
    z = rng.normal(size=(2, 4, 8, 8)).astype(np.float32)
    cond = {"states": rng.normal(size=(2, 16, 32)).astype(np.float32)}
    t = jnp.asarray([5, 800])

    @jax.jit
    def applied(factors, unet):
        params = unflatten_dict(lora.apply(unet, factors, 0.25), sep="/")
        return denoiser.predict(params, z, t, cond, ())[0]

    merged = jax.device_get(lora.apply(unet, factors, 0.25))
    nothing = jax.tree.map(jnp.zeros_like, factors)
    ours, plain = applied(factors, unet), applied(nothing, unet)
    assert np.abs(ours - plain).max() > 1e-2
    np.testing.assert_allclose(applied(nothing, merged), ours, atol=1e-5)


def test_torch_state_is_the_update_in_pytorchs_layout(unet, rng):
    factors = random_factors(unet, 2, rng)
    alpha, rank = 6.0, 2
    state = lora.torch_state(factors, alpha / rank, "unet")
    assert len(state) == 2 * len(factors)
    after = lora.apply(unet, factors, alpha / rank)
    name = "unet.block.attn2.to_out.0.lora"
    down, up = state[f"{name}.down.weight"], state[f"{name}.up.weight"]
    path = "block/attn2/to_out_0/kernel"
    assert (down.shape[0], up.shape[1]) == (rank, rank)
    delta_OI = np.asarray(after[path] - unet[path]).T
    assert np.abs(delta_OI).max() > 1e-3
    np.testing.assert_allclose(up @ down, delta_OI, atol=1e-6)
