# SPDX-License-Identifier: Apache-2.0
"""Our UNet, VAE and CLIP against the last Flax classes of diffusers and transformers.

    python tests/environments.py flax-reference

Those classes are corrected here in what differs from PyTorch: GELU by erf in the gated
layers, eps 1e-6 in the spatial transformer's norm, variances without cancellation and
timestep frequencies computed by NumPy.
"""

import contextlib
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_model import TINY_TEXT, TINY_VAE, WHOLE_UNET, random_params, relative_error

from gift_jax.models import sd, vision
from gift_jax.models.params import from_config, parameter_shapes
from gift_jax.models.sd import architectures

pytestmark = pytest.mark.filterwarnings("default")

from diffusers.models import attention_flax, embeddings_flax, vae_flax  # noqa: E402
from diffusers.models.unets import unet_2d_condition_flax  # noqa: E402
from transformers import CLIPConfig, CLIPTextConfig  # noqa: E402
from transformers.models.clip import modeling_flax_clip  # noqa: E402

UNET = unet_2d_condition_flax.FlaxUNet2DConditionModel
TOLERANCE = 1e-5


@contextlib.contextmanager
def corrected():
    """Within it those classes compute what PyTorch computes."""

    def call(next_fun, args, kwargs, context):
        module, cls = context.module, type(context.module)
        if context.method_name == "__call__":
            if cls in (nn.GroupNorm, nn.LayerNorm) and module.has_variable(
                "params", "scale"
            ):
                return _norm(module, args[0])
            if cls is attention_flax.FlaxGEGLU:
                linear, gate = jnp.split(module.proj(args[0]), 2, axis=-1)
                return linear * jax.nn.gelu(gate, approximate=False)
            if cls is embeddings_flax.FlaxTimesteps:
                return _timesteps(module, args[0])
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(call):
        yield


def _norm(module, x):
    scale, bias = (module.get_variable("params", n) for n in ("scale", "bias"))
    eps, shape = module.epsilon, x.shape
    if isinstance(module, nn.LayerNorm):
        x, axes = x.reshape(-1, shape[-1]), (1,)
    else:
        if isinstance(module.parent, attention_flax.FlaxTransformer2DModel):
            eps = 1e-6
        groups = module.num_groups
        x = x.reshape(shape[0], -1, groups, shape[-1] // groups)
        axes = (1, 3)
    x = x - x.mean(axes, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + eps)
    row = (1,) * (len(shape) - 1) + (-1,)
    return x.reshape(shape) * scale.reshape(row) + bias.reshape(row)


def _timesteps(module, t_B):
    half = module.dim // 2
    exponent = np.float32(-math.log(1e4)) * np.arange(half, dtype=np.float32)
    frequency = np.exp(exponent / np.float32(half - module.freq_shift))
    phase = t_B.astype(jnp.float32)[:, None] * frequency[None]
    parts = [jnp.sin(phase), jnp.cos(phase)]
    return jnp.concatenate(parts[::-1] if module.flip_sin_to_cos else parts, axis=-1)


def shapes(tree):
    return {path: a.shape for path, a in flatten_dict(tree, sep="/").items()}


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_parameters_have_their_names_and_shapes(name):
    configs, key = architectures.MODELS[name], jax.random.key(0)
    ids = jnp.zeros((1, 2), jnp.int32)
    config = configs["text_encoder"]
    text = modeling_flax_clip.FlaxCLIPTextModule(CLIPTextConfig(**config))
    inputs = {
        "unet": from_config(UNET, configs["unet"]).init_weights,
        "vae": from_config(vae_flax.FlaxAutoencoderKL, configs["vae"]).init_weights,
        "text_encoder": lambda key: text.init(key, ids, ids, ids)["params"],
    }
    ours = {
        "unet": sd.build_unet(configs["unet"]),
        "vae": sd.build_vae(configs["vae"]),
        "text_encoder": sd.build_text(config),
    }
    for kind, module in ours.items():
        expected = shapes(jax.eval_shape(inputs[kind], key))
        assert shapes(parameter_shapes(module)) == expected, kind


def test_unet_equals_flax(rng):
    ours, theirs = sd.build_unet(WHOLE_UNET), from_config(UNET, WHOLE_UNET)
    params = random_params(ours, 0)
    z = rng.normal(size=(2, 4, 8, 8)).astype(np.float32)
    t, c = jnp.asarray([3, 987]), rng.normal(size=(2, 16, 32)).astype(np.float32)

    def apply(z):
        return theirs.apply({"params": params}, z, t, c).sample

    stock = apply(z)
    with corrected():
        expected = apply(z)
    assert relative_error(stock, expected) > TOLERANCE
    found, _ = sd.apply_unet(ours, params, z, t, c)
    assert relative_error(found, expected) < TOLERANCE


def test_vae_equals_flax(rng):
    ours = sd.build_vae(TINY_VAE)
    theirs = from_config(vae_flax.FlaxAutoencoderKL, TINY_VAE)
    params = random_params(ours, 0)
    x = rng.uniform(-1, 1, size=(2, 3, 16, 16)).astype(np.float32)
    with corrected():
        variables = {"params": params}
        posterior = theirs.apply(variables, x, method=theirs.encode).latent_dist
        image = theirs.apply(variables, posterior.mean, method=theirs.decode).sample
    mean, logvar = sd.apply_vae_encode(ours, params, x)
    z = jnp.transpose(posterior.mean, (0, 3, 1, 2))
    assert relative_error(mean, z) < TOLERANCE
    expected = jnp.transpose(posterior.logvar, (0, 3, 1, 2))
    assert relative_error(logvar, expected) < TOLERANCE
    assert relative_error(sd.apply_vae_decode(ours, params, z), image) < TOLERANCE


def test_clip_equals_flax(rng):
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    tower |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = {"text_config": TINY_TEXT, "vision_config": tower, "projection_dim": 24}
    ours = vision.build_clip(config)
    theirs = modeling_flax_clip.FlaxCLIPModule(CLIPConfig(**config))
    params = random_params(ours, 0)
    x = rng.normal(size=(2, 3, 16, 16)).astype(np.float32)
    ids = rng.integers(0, 512, size=(2, 16)).astype(np.int32)
    ids[:, 7:] = 513
    positions, mask = jnp.arange(16)[None], jnp.ones((2, 16), jnp.int32)
    with corrected():
        pixels = jnp.transpose(x, (0, 2, 3, 1))
        out = theirs.apply({"params": params}, ids, pixels, mask, positions)
    for found, expected in (
        (vision.apply_clip_text(ours, params, ids), out.text_embeds),
        (vision.apply_clip_image(ours, params, x), out.image_embeds),
    ):
        found = found / np.linalg.norm(found, axis=-1, keepdims=True)
        assert relative_error(found, expected) < TOLERANCE
