# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3's transformer and VAE: as PyTorch computes them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_sd3
from flax.traverse_util import flatten_dict
from tiny_model import random_params, relative_error
from tiny_sd3 import TINY_SD3, TRANSFORMERS, build, configs, transformer_inputs

from gift_jax.models import exports, mmdit, safetensors_io, sd
from gift_jax.models.mmdit import layers
from gift_jax.models.mmdit.network import Network
from gift_jax.models.ops.kernels import Kernels

TOLERANCE = 1e-5


def inputs(rng):
    return transformer_inputs(rng, pooled=56)


def torch_transformer(name, folder):
    config, params = configs(name)["transformer"], build(name)[1]
    return tiny_sd3.torch_transformer("SD3Transformer2DModel", config, params, folder)


def torch_output(model, z, t, states, pooled):
    import torch

    z, t, states, pooled = map(torch.tensor, (z, t, states, pooled))
    return model(z, states, pooled, t).sample


# --- PyTorch's numbers ----------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_equals_pytorch(name, tmp_path, rng):
    """Its output and, by hooks, what is captured; every input is read."""
    torch = pytest.importorskip("torch")
    theirs, hiddens = torch_transformer(name, tmp_path), {}
    for path, part in theirs.named_modules():
        kind = type(part).__name__
        if kind in ("JointTransformerBlock", "Attention"):
            image = 1 if kind == "JointTransformerBlock" else 0

            def hook(_m, _i, out, path=path, image=image):
                out = out if isinstance(out, tuple) else (out,)
                hiddens[re.sub(r"blocks\.(\d+)\.?", r"blocks_\1/", path)] = out[image]

            part.register_forward_hook(hook)
    args = inputs(rng)
    with torch.no_grad():
        expected = torch_output(theirs, *args).numpy()
    module, params = build(name)
    kinds_ = ("transformer", "attention")
    apply = jax.jit(functools.partial(mmdit.apply_transformer, module, capture=kinds_))
    ours, ours_hiddens = apply(params, *args)
    assert relative_error(ours, expected) < TOLERANCE
    hiddens = {path.rstrip("/"): h for path, h in hiddens.items()}
    assert ours_hiddens.keys() == hiddens.keys()
    assert len(hiddens) == 6 + 2 * ("medium" in name)
    for path, hidden in ours_hiddens.items():
        assert relative_error(hidden, hiddens[path].detach().numpy()) < TOLERANCE, path
    for i in range(4):  # each is read
        other = [a[::-1] if i == j else a for j, a in enumerate(args)]
        assert relative_error(apply(params, *other)[0], ours) > 1e-3, i


def test_gradients_equal_pytorchs(tmp_path, rng):
    pytest.importorskip("torch")
    args, name = inputs(rng), "sd3.5-medium"
    weight = rng.normal(size=args[0].shape).astype(np.float32)
    theirs = torch_transformer(name, tmp_path)
    import torch

    (torch_output(theirs, *args) * torch.tensor(weight)).mean().backward()
    module, params = build(name)

    @jax.jit
    @jax.grad
    def gradient(params):
        out, _ = mmdit.apply_transformer(module, params, *args)
        return jnp.mean(out * weight)

    ours = flatten_dict(gradient(params), sep="/")
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert len(ours) == len(expected) + 1  # the table of places, no parameter there
    scale = max(float(g.norm()) for g in expected.values())
    for path, array in ours.items():
        array = safetensors_io.to_torch_layout(path, np.asarray(array))
        if path != "pos_embed/pos_embed":
            other = expected[safetensors_io.torch_name(path)].numpy()
            limit = 1e-4 * max(np.linalg.norm(other), 1e-3 * scale)
            assert np.linalg.norm(array - other) < limit, path


def test_vae_equals_pytorch(tmp_path, rng):
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL

    config = TINY_SD3["vae"]
    vae = sd.build_vae(config)
    params = random_params(vae, 0)
    assert not {"quant_conv", "post_quant_conv"} & params.keys()
    exports.save_model_folder(tmp_path, config, params)
    theirs = AutoencoderKL.from_pretrained(str(tmp_path))
    x = rng.uniform(-1, 1, size=(2, 3, 16, 24)).astype(np.float32)
    z = rng.normal(size=(2, 16, 8, 12)).astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(torch.tensor(x)).latent_dist
        image = theirs.decode(torch.tensor(z)).sample
    mean, logvar = jax.jit(lambda p: sd.apply_vae_encode(vae, p, x))(params)
    decoded = jax.jit(lambda p: sd.apply_vae_decode(vae, p, z))(params)
    assert relative_error(mean, posterior.mean.numpy()) < TOLERANCE
    assert relative_error(logvar, posterior.logvar.numpy()) < TOLERANCE
    assert relative_error(decoded, image.numpy()) < TOLERANCE
    assert vae.shift_factor == theirs.config.shift_factor == 0.0609
    assert vae.scaling_factor == theirs.config.scaling_factor == 1.5305


@pytest.mark.parametrize("change", [{"shift_factor": None}, {}])
def test_vae_without_a_shift_has_none(change):
    config = {k: v for k, v in TINY_SD3["vae"].items() if k != "shift_factor"}
    assert sd.build_vae(config | change).shift_factor == 0.0


def test_new_tables_of_places_are_pytorchs():
    pytest.importorskip("torch")
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    for width, side, base in ((32, 6, 4), (64, 192, 64)):
        expected = get_2d_sincos_pos_embed(width, side, base_size=base).float()[None]
        table = layers.position_table(width, side, base)
        np.testing.assert_array_equal(table, expected.numpy())


def test_places_on_disk_are_used(rng):
    """Not those of a new table: a file may have others."""
    module, params = build("sd3")
    args, table = inputs(rng), params["pos_embed"]["pos_embed"]
    moved = params | {"pos_embed": params["pos_embed"] | {"pos_embed": 0 * table}}
    apply = jax.jit(functools.partial(mmdit.apply_transformer, module))
    ours, other = (apply(p, *args)[0] for p in (params, moved))
    assert relative_error(other, ours) > 1e-3


# --- choices --------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_computed_again_is_the_same(rng):
    args = inputs(rng)

    def loss_of(remat):
        module = build("sd3.5-medium")[0].clone(kernels=Kernels(remat=remat))

        def loss(params):
            kinds_ = ("transformer",)
            out, h = mmdit.apply_transformer(module, params, *args, kinds_)
            return jnp.mean(out**2) + sum(jnp.mean(a**2) for a in h.values())

        return loss

    params, value, grads, remats = build("sd3.5-medium")[1], {}, {}, {}
    for remat in ("none", "block", "full"):
        loss = loss_of(remat)
        remats[remat] = str(jax.make_jaxpr(jax.grad(loss))(params)).count("remat")
        value[remat], grads[remat] = jax.jit(jax.value_and_grad(loss))(params)
    assert 0 == remats["none"] < remats["block"] < remats["full"]
    for remat in ("block", "full"):
        np.testing.assert_allclose(value[remat], value["none"], rtol=1e-6)
        for a, b in zip(
            *map(jax.tree.leaves, (grads[remat], grads["none"])), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max())


def test_bfloat16_is_close(rng):
    args = inputs(rng)
    module, params = build("sd3.5-medium")
    half = module.clone(dtype=jnp.bfloat16)
    params_half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params)
    cond = {"states": args[2], "pooled": args[3]}
    ours, _ = jax.jit(Network(half).predict)(params_half, *args[:2], cond)
    exact, _ = jax.jit(Network(module).predict)(params, *args[:2], cond)
    assert ours.dtype == jnp.bfloat16
    difference = np.linalg.norm(np.asarray(ours, np.float32) - exact)
    assert 1e-3 < difference / np.linalg.norm(exact) < 5e-2  # of a random network


def test_network_is_the_transformer(rng):
    module, params = build("sd3")
    z, t, states, pooled = inputs(rng)
    cond, network = {"states": states, "pooled": pooled}, Network(module)
    kinds_ = ("transformer",)

    @jax.jit
    def run(params):
        bound = network.with_cond(params, cond)(z, t)
        whole = network.predict(params, z, t, cond, kinds_)
        args = module, params, z, t, states, pooled
        return bound, *whole, *mmdit.apply_transformer(*args, kinds_)

    bound, ours, hiddens, expected, others = run(params)
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    np.testing.assert_allclose(bound, expected, atol=1e-6)
    assert hiddens.keys() == others.keys()
    assert hiddens["transformer_blocks_2"].shape == (2, 24, 32)
    assert hash(network) == hash(Network(module))


@pytest.mark.parametrize("shape", [(9, 8), (8, 22)])
def test_latents_of_another_size_are_refused(shape, rng):
    module, params = build("sd3")
    _, t, states, pooled = inputs(rng)
    assert module.max_side == 20
    z = np.zeros((2, 16, *shape), np.float32)
    with pytest.raises(ValueError, match=r"multiples of patch_size=2, and at most 20"):
        mmdit.apply_transformer(module, params, z, t, states, pooled)


def test_unknown_states_are_refused(rng):
    module, params = build("sd3")
    with pytest.raises(ValueError, match="capture='resnet' must be one of transform"):
        mmdit.apply_transformer(module, params, *inputs(rng), ("resnet",))


# --- equal tokens ---------------------------------------------------------------------

REPEATS = 256


def repeated_inputs(rng):
    """`inputs` whose last token is zeros, and the same with all of them."""
    z, t, states, pooled = inputs(rng)
    states[:, -1] = 0
    rows = np.concatenate([states, np.zeros((2, REPEATS - 1, 96), np.float32)], axis=1)
    return (z, t, states, pooled), (z, t, rows, pooled)


@pytest.mark.parametrize(
    "name", ["sd3", pytest.param("sd3.5-medium", marks=pytest.mark.slow)]
)
def test_one_token_counts_as_many(name, rng):
    """Output, what is captured and gradients; without the count they are others."""
    few, many = repeated_inputs(rng)
    weight = rng.normal(size=few[0].shape).astype(np.float32)
    module, params = build(name)

    def run(module, args):
        def loss(params):
            kinds_ = ("transformer", "attention")
            out, hiddens = mmdit.apply_transformer(module, params, *args, kinds_)
            return jnp.mean(weight * out), (out, hiddens)

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    ours, (out, hiddens) = run(module.clone(repeats=REPEATS), few)
    expected, (truth, others) = run(module, many)
    assert relative_error(out, truth) < TOLERANCE
    assert relative_error(run(module, few)[1][0], truth) > 1e-2
    for path, hidden in hiddens.items():
        assert relative_error(hidden, others[path]) < TOLERANCE, path
    scale = max(np.abs(g).max() for g in jax.tree.leaves(expected))
    for a, b in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5 * scale)


@pytest.mark.parametrize("dtype, limit", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("attention", ["plain", "chunked", "flash"])
def test_kernels_count_a_key_as_many(attention, dtype, limit, rng):
    shape = 2, 200, 2, 16
    q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3))
    kernels = Kernels(attention, platform="cpu")
    ours = layers.attend_repeated(kernels, q, k, v, REPEATS)
    k, v = (jnp.concatenate([a] + [a[:, -1:]] * (REPEATS - 1), axis=1) for a in (k, v))
    expected = Kernels("plain").attend(*(a.astype(jnp.float32) for a in (q, k, v)))
    assert ours.dtype == q.dtype
    assert relative_error(ours.astype(jnp.float32), expected) < limit
