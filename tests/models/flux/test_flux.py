# SPDX-License-Identifier: Apache-2.0
"""FLUX.1's transformer: as PyTorch computes it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_sd3
from flax.traverse_util import flatten_dict
from tiny_flux import NAMES, build, configs
from tiny_model import relative_error
from tiny_sd3 import transformer_inputs

from gift_jax.models import mmdit, safetensors_io
from gift_jax.models.flux.transformer import GUIDANCE, packed, unpacked
from gift_jax.models.ops.kernels import Kernels

TOLERANCE = 1e-5


def inputs(rng):
    return transformer_inputs(rng, pooled=32)


def torch_transformer(name, folder):
    config, params = configs(name)["transformer"], build(name)[1]
    return tiny_sd3.torch_transformer("FluxTransformer2DModel", config, params, folder)


def torch_output(model, z, t, states, pooled, guidance=GUIDANCE):
    """Returns what the pipeline makes of packed latents: "B C H W"."""
    import torch
    from diffusers import FluxPipeline

    z, t, states, pooled = map(torch.tensor, (z, t, states, pooled))
    (B, C, H, W), pipe = z.shape, FluxPipeline
    has_guidance = model.config.guidance_embeds
    out = model(
        hidden_states=pipe._pack_latents(z, B, C, H, W),
        encoder_hidden_states=states,
        pooled_projections=pooled,
        timestep=t / 1000,
        img_ids=pipe._prepare_latent_image_ids(B, H // 2, W // 2, None, t.dtype),
        txt_ids=torch.zeros(states.shape[1], 3),
        guidance=torch.full((B,), guidance) if has_guidance else None,
    ).sample
    return pipe._unpack_latents(out, H, W, 1)


@pytest.mark.parametrize("name", NAMES)
def test_transformer_equals_pytorch(name, tmp_path, rng):
    """Its output and, by hooks, what is captured; every input is read."""
    torch = pytest.importorskip("torch")
    theirs, hiddens, tokens = torch_transformer(name, tmp_path), {}, 24
    for path, part in theirs.named_modules():
        kind = type(part).__name__
        if kind in (
            "FluxTransformerBlock",
            "FluxSingleTransformerBlock",
            "FluxAttention",
        ):

            def hook(_m, _i, out, path=path, kind=kind):
                if isinstance(out, tuple):  # the blocks return the text's states first
                    out = out[0 if kind == "FluxAttention" else 1]
                path = re.sub(r"blocks\.(\d+)\.?", r"blocks_\1/", path).rstrip("/")
                hiddens[path] = out[:, -tokens:].numpy()

            part.register_forward_hook(hook)
    args = inputs(rng)
    with torch.no_grad():
        expected = torch_output(theirs, *args).numpy()
    module, params = build(name)
    kinds = ("transformer", "attention")
    apply = jax.jit(functools.partial(mmdit.apply_transformer, module, capture=kinds))
    ours, ours_hiddens = apply(params, *args)
    assert relative_error(ours, expected) < TOLERANCE
    assert ours_hiddens.keys() == hiddens.keys() and len(hiddens) == 8
    for path, hidden in ours_hiddens.items():
        assert relative_error(hidden, hiddens[path]) < TOLERANCE, path
    for i in range(4):  # each is read
        other = [a[::-1] if i == j else a for j, a in enumerate(args)]
        assert relative_error(apply(params, *other)[0], ours) > 1e-3, i
    assert ("guidance_embedder" in params["time_text_embed"]) == (name == "dev")
    with torch.no_grad():
        other = torch_output(theirs, *args, guidance=1.0).numpy()
    assert (relative_error(other, expected) > 1e-3) == (name == "dev")


def test_gradients_equal_pytorchs(tmp_path, rng):
    """Of all parameters, whatever the backward pass computes again."""
    torch = pytest.importorskip("torch")
    args = inputs(rng)
    weight = rng.normal(size=args[0].shape).astype(np.float32)
    theirs = torch_transformer("dev", tmp_path)
    (torch_output(theirs, *args) * torch.tensor(weight)).mean().backward()
    module, params = build("dev")
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    scale = max(np.linalg.norm(g) for g in expected.values())
    for remat in ("none", "full"):
        again = module.clone(kernels=Kernels(remat=remat))

        def loss(params, again=again):
            return jnp.mean(mmdit.apply_transformer(again, params, *args)[0] * weight)

        count = str(jax.make_jaxpr(jax.grad(loss))(params)).count("remat")
        assert (count > 0) == (remat == "full")
        ours = flatten_dict(jax.jit(jax.grad(loss))(params), sep="/")
        assert len(ours) == len(expected)
        for path, array in ours.items():
            array = safetensors_io.to_torch_layout(path, np.asarray(array))
            other = expected[safetensors_io.torch_name(path)]
            limit = 1e-4 * max(np.linalg.norm(other), 1e-3 * scale)
            assert np.linalg.norm(array - other) < limit, path


def test_tokens_are_the_pipelines(rng):
    torch = pytest.importorskip("torch")
    from diffusers import FluxPipeline

    z = inputs(rng)[0]
    theirs = FluxPipeline._pack_latents(torch.tensor(z), *z.shape)
    np.testing.assert_array_equal(packed(z), theirs)
    np.testing.assert_array_equal(unpacked(packed(z), 8, 12), z)


def test_latents_of_odd_sides_are_refused(rng):
    module, params = build("dev")
    _, *others = inputs(rng)
    z = np.zeros((2, 16, 9, 8), np.float32)
    with pytest.raises(ValueError, match="latents of 9x8; both must be multiples of 2"):
        mmdit.apply_transformer(module, params, z, *others)
