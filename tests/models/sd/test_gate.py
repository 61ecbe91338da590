# SPDX-License-Identifier: Apache-2.0
"""The gate: the detector by itself equals the one in the network, and nothing moves it.

On a UNet of two sizes with every kind of layer, 64 channels in groups of two.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax.traverse_util import flatten_dict
from gated_network import compile_network

from gift_jax.models import sd
from gift_jax.models.sd import gate
from gift_jax.runtime.errors import UserError

CONFIG = tiny_model.WHOLE_UNET | {"block_out_channels": [64, 128]}
RATE, STEPS = 1e-4, 300  # of an attacker; Adam moves a weight by the product at most


@pytest.fixture(scope="module")
def setting():
    """(gate, the detector's parameters, the UNet's, inputs)."""
    unet = sd.build_unet(CONFIG)
    params = flatten_dict(tiny_model.random_params(unet, 0), sep="/")
    key = jax.random.key(1)
    z = jax.random.normal(key, (4, CONFIG["in_channels"], 8, 8))
    text = jax.random.normal(key, (4, 5, CONFIG["cross_attention_dim"]))
    g = gate.Gate(unet)
    return g, g.init(jax.random.key(2)), params, (z, jnp.arange(4) * 200, text)


@functools.cache
def compiled(g):
    """The programs of a gate's network: the logits of its last block, its output."""
    last = g.up[-1]

    def to_logits(wide):
        inside = jnp.max(wide[..., last.hidden], (1, 2, 3))
        return gate.LOGIT_SLOPE / gate._SLOPE * inside

    return compile_network(g.unet, f"{last.path}/norm2", to_logits, sd.apply_unet)


def test_network_computes_what_the_detector_does(setting):
    g, params, network, inputs = setting
    expected = g.logits(params, inputs[0])
    assert np.ptp(expected) > 0.1
    new, _ = g.install(params, network, threshold=2.0)
    np.testing.assert_allclose(
        compiled(g).logits(new, inputs), expected - 2.0, atol=1e-3
    )


def test_network_of_sdxl_does_so_too(setting):
    """No attention at the latents' size, and more beside the timestep."""
    unet = sd.build_unet(tiny_model.TINY_XL["unet"] | {"block_out_channels": [64, 128]})
    network = flatten_dict(tiny_model.random_params(unet, 0), sep="/")
    g, z = gate.Gate(unet), setting[3][0]
    params = g.init(jax.random.key(2))
    text = jax.random.normal(jax.random.key(3), (4, 5, unet.cross_attention_dim))
    added = jnp.ones((4, unet.pooled_width)), jnp.full((4, 6), 16.0)
    new, _ = g.install(params, network, threshold=2.0)
    expected = g.logits(params, z)
    assert np.ptp(expected) > 0.1
    inside = compiled(g).logits(new, (z, jnp.arange(4) * 200, text, added)) + 2.0
    np.testing.assert_allclose(inside, expected, atol=2e-3)


def test_detector_reads_neither_text_nor_timestep(setting):
    g, params, network, (z, t, text) = setting
    new, _ = g.install(params, network, 0.0)
    one = compiled(g).logits(new, (z, t, text))
    other = z, t[::-1] + 7, 3 * text
    assert not np.allclose(
        compiled(g).output(new, (z, t, text)), compiled(g).output(new, other)
    )
    np.testing.assert_array_equal(one, compiled(g).logits(new, other))


def test_gate_closes_at_the_threshold(setting):
    """Closed, nothing that the network knows shows; open, the gate adds nothing."""
    g, params, network, inputs = setting
    logits = np.asarray(g.logits(params, inputs[0]))
    other, change = (inputs[0], inputs[1][::-1] + 7, 3 * inputs[2]), {}
    for name, threshold in (("closed", logits.min() - 5), ("open", logits.max() + 5)):
        new, owned = g.install(params, network, threshold)
        out = compiled(g).output(new, inputs)
        change[name] = float(jnp.std(out - compiled(g).output(new, other)))
        if name == "open":
            kernel = f"{g.up[-1].path}/conv2/kernel"
            no_push = {**new, kernel: jnp.where(owned[kernel], 0.0, new[kernel])}
            np.testing.assert_array_equal(out, compiled(g).output(no_push, inputs))
    assert change["open"] > 0.1
    assert change["closed"] < 0.02 * change["open"]


def test_one_image_closes_it_everywhere_and_only_for_itself(setting):
    """Also where the detector fires at few positions: the output jumps at all."""
    g, params, network, inputs = setting
    logits = np.asarray(g.logits(params, inputs[0]))
    second, first = np.sort(logits)[-2:]
    assert first - second > 0.05
    fires = logits == first
    steep = {
        path: 40.0 * a if path.startswith(f"{g.up[-1].path}/norm2") else a
        for path, a in params.items()
    }
    new, _ = g.install(steep, network, 40.0 * (first + second) / 2)
    without, _ = g.install(steep, network, 40.0 * (first + 1.0))
    out, expected = (np.asarray(compiled(g).output(n, inputs)) for n in (new, without))
    np.testing.assert_array_equal(out[~fires], expected[~fires])
    assert np.abs(expected).max() < 0.5 * gate._JUMP
    assert np.abs(out[fires]).min() > 0.5 * gate._JUMP


def test_what_the_gate_does_not_own_stays(setting):
    g, params, network, _ = setting
    new, owned = jax.device_get(g.install(params, network, 0.0))
    assert set(new) == set(network)
    for path, values in network.items():
        is_rest = ~owned[path] if path in owned else np.ones(values.shape, bool)
        np.testing.assert_array_equal(new[path][is_rest], np.asarray(values)[is_rest])
    share = sum(mask.sum() for mask in owned.values()) / sum(
        np.size(a) for a in network.values()
    )
    assert 0 < share < 0.1


def test_lora_of_attention_reaches_nothing_of_it(setting):
    g, params, network, inputs = setting
    new, _ = g.install(params, network, 0.0)
    noise = {
        path: a + 0.3 * jax.random.normal(jax.random.key(5), a.shape)
        for path, a in new.items()
        if "/attn" in path
    }
    assert noise
    changed = {**new, **noise}
    assert not np.allclose(
        compiled(g).output(new, inputs), compiled(g).output(changed, inputs)
    )
    np.testing.assert_array_equal(
        compiled(g).logits(new, inputs), compiled(g).logits(changed, inputs)
    )


def test_large_weights_keep_it_from_turning(setting, monkeypatch):
    """The most that an attack can take from a logit, to first order."""
    g, params, network, inputs = setting
    slope = jax.jit(jax.grad(lambda n: jnp.mean(compiled(g).logits(n, inputs))))
    change = {}
    for name, size in (("large", 1.0), ("usual", 1e-3)):
        with monkeypatch.context() as patch:
            patch.setattr(gate, "_STREAM", gate._STREAM * size)
            patch.setattr(gate, "_LARGE", gate._LARGE * size)
            new, _ = g.install(params, network, 0.0)
        grads = jax.device_get(slope(new)).values()
        change[name] = sum(RATE * STEPS * np.abs(a).sum() for a in grads)
    assert change["usual"] > 20.0
    assert change["large"] < 2.0


def test_unet_of_one_size_can_have_none():
    unet = sd.build_unet(tiny_model.TINY_UNET)
    with pytest.raises(UserError, match="gift_gate needs a UNet of two sizes and"):
        gate.Gate(unet)
