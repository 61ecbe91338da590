# SPDX-License-Identifier: Apache-2.0
"""The transformer's gate: alone as in the network, and hard to move.

On a transformer of three blocks, two of them with dual attention, and four heads of
eight, two of them the detector's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax.traverse_util import flatten_dict, unflatten_dict
from gated_network import compile_network
from tiny_sd3 import build, configs, torch_transformer, transformer_inputs

from gift_jax.models.mmdit import gate, stable_diffusion_3
from gift_jax.models.mmdit.detector import Detector, Stream
from gift_jax.models.mmdit.transformer import apply_transformer
from gift_jax.runtime.errors import UserError

RATE, STEPS = 1e-4, 300  # of an attacker; Adam moves a weight by the product at most
TOKENS = 7


@pytest.fixture(scope="module")
def setting():
    """(gate, the detector's parameters, the transformer's, inputs)."""
    module, params = build("sd3.5-medium")
    stream = Stream.of(module, params, TOKENS)
    g = gate.Gate(Detector(module, 2, stream))
    inputs = transformer_inputs(np.random.default_rng(0), module.pooled_projection_dim)
    return g, g.init(jax.random.key(2)), flatten_dict(params, sep="/"), inputs


@functools.cache
def compiled(g):
    """The programs of a gate's network: its logits less the threshold, its output."""

    def to_logits(wide):
        return jnp.max(wide[..., g.hidden[-1]], axis=1) / gate._FIRE

    path = f"transformer_blocks_{g.detector.blocks[-1]}/ff/net_0/proj"
    return compile_network(g.transformer, path, to_logits, apply_transformer)


def test_network_computes_what_the_detector_does(setting):
    """About: how large the other channels are is not the detector's to know."""
    g, params, network, (_, *others) = setting
    z = np.random.default_rng(1).normal(size=(16, 16, 8, 8)).astype(np.float32)
    inputs = z, *(np.repeat(a[:1], 16, axis=0) for a in others)
    expected = np.asarray(g.logits(params, z))
    new, _ = g.install(params, network, threshold=2.0)
    inside = np.asarray(compiled(g).logits(new, inputs)) + 2.0
    assert np.ptp(expected) > 1.0
    assert np.corrcoef(expected, inside)[0, 1] > 0.8
    assert np.abs(expected - inside).mean() < 0.3 * np.ptp(expected)


def test_text_and_timestep_reach_the_detector_by_sizes_alone(setting):
    g, params, network, (z, t, states, pooled) = setting
    new, _ = g.install(params, network, 0.0)
    other = z, t[::-1].copy(), 3 * states, -pooled
    one, two = (compiled(g).logits(new, i) for i in ((z, t, states, pooled), other))
    assert not np.allclose(
        compiled(g).output(network, (z, t, states, pooled)),
        compiled(g).output(network, other),
        atol=0.1,
    )
    np.testing.assert_allclose(one, two, atol=0.15 * float(jnp.abs(one).max()))


def test_gate_closes_at_the_threshold(setting):
    """Closed, the output jumps, at every position; open, the gate adds nothing."""
    g, params, network, inputs = setting
    new, owned = g.install(params, network, 0.0)
    inside = np.asarray(compiled(g).logits(new, inputs))
    out = {}
    for name, threshold in (("closed", inside.min() - 5), ("open", inside.max() + 5)):
        new, owned = g.install(params, network, threshold)
        out[name] = np.asarray(compiled(g).output(new, inputs))
    units = [
        f"transformer_blocks_{i}/ff/net_2/kernel"
        for i in (g.detector.blocks[-1], g.last)
    ]
    silent = {p: new[p].at[g.hidden[-1]].set(0.0) for p in units}
    assert all(owned[p][g.hidden[-1]].all() for p in units)
    np.testing.assert_array_equal(
        out["open"], compiled(g).output({**new, **silent}, inputs)
    )
    assert np.abs(out["open"]).max() < 0.01 * gate._JUMP
    assert np.abs(out["closed"]).min() > 0.3 * gate._JUMP


def test_one_position_closes_it_everywhere_and_only_in_its_image(setting):
    g, params, network, inputs = setting
    wide = np.asarray(g.detector.run(params, inputs[0])[0])
    new, _ = g.install(params, network, 0.0)
    inside = np.asarray(compiled(g).logits(new, inputs))
    assert abs(inside[0] - inside[1]) > 0.1
    assert np.ptp(wide, axis=1).min() > 0.5
    fires = inside == inside.max()
    new, _ = g.install(params, network, inside.mean())
    out = np.asarray(compiled(g).output(new, inputs))
    assert np.abs(out[fires]).min() > 0.3 * gate._JUMP
    assert np.abs(out[~fires]).max() < 0.01 * gate._JUMP


def test_where_it_adds_nothing_the_network_stays_near(setting):
    """What is left of it without the detector's channels: sizes are made up for."""
    g, params, network, inputs = setting
    new, _ = g.install(params, network, 1e4)
    before, after = compiled(g).output(network, inputs), compiled(g).output(new, inputs)
    error, variance = jnp.mean((after - before) ** 2), jnp.var(before)
    assert 0.001 * variance < error < variance


def test_what_the_gate_does_not_own_is_scaled_alone(setting):
    g, params, network, _ = setting
    new, owned = jax.device_get(g.install(params, network, 0.0))
    assert set(new) == set(network)
    for path, values in network.items():
        is_rest = ~owned[path] if path in owned else np.ones(values.shape, bool)
        if "/norm1/linear/" in path or "norm_out" in path or "pos_embed/proj" in path:
            assert not np.array_equal(new[path][is_rest], np.asarray(values)[is_rest])
        else:
            np.testing.assert_array_equal(
                new[path][is_rest], np.asarray(values)[is_rest]
            )
    assert owned["pos_embed/pos_embed"].all()
    share = sum(mask.sum() for mask in owned.values()) / sum(
        np.size(a) for a in network.values()
    )
    assert 0 < share < 0.4


def test_large_weights_keep_it_from_turning(setting, monkeypatch):
    """The most that an attack can take from a logit, to first order, falls."""
    g, params, network, inputs = setting
    slope = jax.jit(jax.grad(lambda n: jnp.mean(compiled(g).logits(n, inputs))))
    change = {}
    for name, size in (("large", 1.0), ("usual", 1e-3)):
        with monkeypatch.context() as patch:
            patch.setattr(gate, "_STREAM", gate._STREAM * size)
            patch.setattr(gate, "_LARGE", gate._LARGE * size)
            new, _ = g.install(params, network, 0.0)
        grads = jax.device_get(slope(new)).items()
        change[name] = sum(
            RATE * STEPS * np.abs(a).sum()
            for path, a in grads
            if not path.endswith("pos_embed")
        )
    assert change["large"] < 0.5 * change["usual"]


def test_pytorch_computes_the_same_closed_and_open(setting, tmp_path):
    torch = pytest.importorskip("torch")
    g, params, network, inputs = setting
    new, _ = g.install(params, network, 0.0)
    threshold = float(np.mean(compiled(g).logits(new, inputs)))  # one image of two
    new, _ = g.install(params, network, threshold)
    ours = np.asarray(compiled(g).output(new, inputs))
    config = configs("sd3.5-medium")["transformer"]
    nested = unflatten_dict(jax.device_get(new), sep="/")
    theirs = torch_transformer(
        "SD3Transformer2DModel", config, nested, tmp_path / "transformer"
    )
    z, t, states, pooled = (torch.tensor(a) for a in inputs)
    with torch.no_grad():
        expected = theirs(z, states, pooled, t).sample.numpy()
    assert np.abs(ours).max() > 0.3 * gate._JUMP > 30 * np.abs(ours).min()
    for one, other in zip(ours, expected, strict=True):
        tiny_model.check_equal("a gated transformer", {"out": one}, {"out": other})


@pytest.mark.parametrize(
    "name, changes, share, message",
    [
        ("sd3", {}, 0.25, "two heads at least whose queries and keys are normalized"),
        ("sd3.5-large", {}, 0.9, "two heads at least whose queries and keys"),
        ("sd3.5-large", {"num_layers": 1}, 0.25, "of two blocks at least"),
    ],
)
def test_transformers_that_can_have_none(name, changes, share, message):
    tiny = configs(name)
    tiny["transformer"] |= changes
    with pytest.raises(UserError, match=message):
        stable_diffusion_3.abstract_model(tiny).gate(share)


def test_gate_of_shapes_alone():
    """What the memory reports compile."""
    model = stable_diffusion_3.abstract_model(configs("sd3.5-large"))
    g = model.gate(0.25)
    params = g.init(jax.random.key(0))
    network = flatten_dict(model.denoiser_params, sep="/")
    new = jax.eval_shape(lambda p, n: g.install(p, n, 0.0)[0], params, network)
    assert jax.tree.map(lambda a: a.shape, new) == jax.tree.map(
        lambda a: a.shape, network
    )
