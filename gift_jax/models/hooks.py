# SPDX-License-Identifier: Apache-2.0
"""Runs diffusers' and transformers' Flax models exactly as PyTorch runs its own.

The one module that knows the class names of those libraries. Everything is corrected
from outside with `flax.linen.intercept_methods`; no class is copied or patched, and
nothing is changed outside the `with exact():` block.

What differs as shipped, and is corrected here (float32, against PyTorch):
  GEGLU uses the tanh approximation of GELU (PyTorch: erf);
  the spatial transformer's GroupNorm has eps 1e-5 (PyTorch: 1e-6);
  GroupNorm and LayerNorm use E[x^2] - E[x]^2 for the variance, which cancels;
  the timestep frequencies are computed on the device (here: constants of the program);
  DINOv2's layer scale is also multiplied by the square of its initial value.
And, equal in value but faster: nearest upsampling without a gather, and, on CPUs, what
`Kernels` says of convolutions, norms and gated layers.
"""

import contextlib
import logging
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

_FLAX_LOGGERS = (
    "models.attention_flax",
    "models.embeddings_flax",
    "models.modeling_flax_utils",
    "models.resnet_flax",
    "models.unets.unet_2d_blocks_flax",
    "models.unets.unet_2d_condition_flax",
    "models.vae_flax",
    "schedulers.scheduling_ddim_flax",
    "schedulers.scheduling_dpmsolver_multistep_flax",
    "schedulers.scheduling_pndm_flax",
    "schedulers.scheduling_utils_flax",
)


def _not_deprecation(record):
    return not record.getMessage().startswith("Flax classes are deprecated")


for _name in _FLAX_LOGGERS:  # before the imports below: some lines come at import
    logging.getLogger(f"diffusers.{_name}").addFilter(_not_deprecation)

from diffusers.models import (  # noqa: E402
    attention_flax,
    embeddings_flax,
    resnet_flax,
    vae_flax,  # noqa: E402
)
from diffusers.models.unets import unet_2d_blocks_flax  # noqa: E402
from diffusers.models.unets.unet_2d_condition_flax import (  # noqa: E402
    FlaxUNet2DConditionModel,
)
from transformers import (  # noqa: E402
    CLIPConfig,
    CLIPTextConfig,
    Dinov2Config,
    ResNetConfig,
    ViTConfig,
)
from transformers.models.clip.modeling_flax_clip import (  # noqa: E402
    FlaxCLIPModule,
    FlaxCLIPTextModule,
)
from transformers.models.dinov2 import modeling_flax_dinov2  # noqa: E402
from transformers.models.resnet.modeling_flax_resnet import (  # noqa: E402
    FlaxResNetForImageClassificationModule,
)
from transformers.models.vit.modeling_flax_vit import (  # noqa: E402
    FlaxViTForImageClassificationModule,
    FlaxViTModule,
)

from gift_jax.models import conv_clip, kernels, norms  # noqa: E402
from gift_jax.models.kernels import Kernels, conv_as_matmul  # noqa: E402

CAPTURE_KINDS = {
    "transformer": (attention_flax.FlaxBasicTransformerBlock,),
    "resnet": (resnet_flax.FlaxResnetBlock2D,),
    "attention": (attention_flax.FlaxAttention,),
}


# --- building -------------------------------------------------------------------------


def _fields(cls, config):
    names = {
        f for f in cls.__dataclass_fields__ if f not in ("parent", "name", "dtype")
    }
    as_tuple = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    return {k: v for k, v in as_tuple.items() if k in names}


def build_unet(config, dtype=jnp.float32):
    """Returns the UNet module for a diffusers `unet/config.json` dict."""
    return FlaxUNet2DConditionModel(
        dtype=dtype, **_fields(FlaxUNet2DConditionModel, config)
    )


def build_vae(config, dtype=jnp.float32):
    """Returns the VAE module for a diffusers `vae/config.json` dict."""
    return vae_flax.FlaxAutoencoderKL(
        dtype=dtype, **_fields(vae_flax.FlaxAutoencoderKL, config)
    )


def build_text(config, dtype=jnp.float32):
    """Returns the CLIP text module for a `text_encoder/config.json` dict."""
    return FlaxCLIPTextModule(CLIPTextConfig(**config), dtype=dtype)


def build_clip(config, dtype=jnp.float32):
    """Returns the two-tower CLIP module for a CLIPModel `config.json` dict.

    With `conv_channels` in its vision_config it is a `conv_clip.ConvClip`.
    """
    convolutional = "conv_channels" in config.get("vision_config", {})
    module = conv_clip.ConvClip if convolutional else FlaxCLIPModule
    return module(CLIPConfig(**config), dtype=dtype)


def build_vit(config, dtype=jnp.float32):
    """Returns the module, without a pooler, for a ViTModel `config.json` dict."""
    return FlaxViTModule(ViTConfig(**config), dtype=dtype, add_pooling_layer=False)


def build_dinov2(config, dtype=jnp.float32):
    """Returns the module for a Dinov2Model `config.json` dict."""
    config = Dinov2Config(**config)
    config.mlp_ratio = int(config.mlp_ratio)  # 4.0 would be a width of another type
    return modeling_flax_dinov2.FlaxDinov2Module(config, dtype=dtype)


def build_resnet_classifier(config, dtype=jnp.float32):
    """Returns the module for a ResNetForImageClassification `config.json` dict."""
    return FlaxResNetForImageClassificationModule(ResNetConfig(**config), dtype=dtype)


def build_vit_classifier(config, dtype=jnp.float32):
    """Returns the module for a ViTForImageClassification `config.json` dict."""
    return FlaxViTForImageClassificationModule(ViTConfig(**config), dtype=dtype)


def init_params(module, key):
    """Returns randomly initialised parameters (nested dict) of a module built above.

    Among a batch norm's are its running statistics, mean and var.
    """
    rngs = {"params": key, "dropout": key, "gaussian": key}
    ids, mask = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), jnp.int32)
    if isinstance(module, FlaxUNet2DConditionModel):
        size = 2 ** len(module.block_out_channels)
        args = (
            jnp.zeros((1, module.in_channels, size, size)),
            jnp.zeros((1,), jnp.int32),
            jnp.zeros((1, 2, module.cross_attention_dim)),
        )
    elif isinstance(module, vae_flax.FlaxAutoencoderKL):
        size = 2 ** len(module.block_out_channels)
        args = (jnp.zeros((1, module.in_channels, size, size)),)
    elif isinstance(module, FlaxCLIPTextModule):
        args = (ids, mask, ids)
    elif isinstance(module, FlaxResNetForImageClassificationModule):
        variables = module.init(rngs, jnp.zeros((1, 64, 64, 3)))
        return _join_statistics(variables["params"], variables["batch_stats"])
    elif isinstance(
        module,
        FlaxViTModule
        | FlaxViTForImageClassificationModule
        | modeling_flax_dinov2.FlaxDinov2Module,
    ):
        size = module.config.image_size
        with exact(Kernels(conv="xla")):  # the layer scale as shipped promotes ranks
            pixels = jnp.zeros((1, size, size, module.config.num_channels))
            return module.init(rngs, pixels)["params"]
    else:
        size = module.config.vision_config.image_size
        args = (ids, jnp.zeros((1, size, size, 3)), mask, ids)
    return module.init(rngs, *args)["params"]


def _join_statistics(params, statistics):
    flat = flatten_dict(params) | flatten_dict(statistics)
    return unflatten_dict(flat)


def _split_statistics(params):
    """Returns Flax's variables of what `_join_statistics` put together."""
    parts = {"params": {}, "batch_stats": {}}
    for path, array in flatten_dict(params).items():
        is_statistic = path[-1] in ("mean", "var")
        parts["batch_stats" if is_statistic else "params"][path] = array
    return {name: unflatten_dict(flat) for name, flat in parts.items()}


def parameter_shapes(module):
    """Returns the parameters' shapes (nested ShapeDtypeStructs), computing none."""
    return jax.eval_shape(lambda: init_params(module, jax.random.key(0)))


# --- the corrected layers -------------------------------------------------------------


def _standardise(x, axes, eps):
    mean = jnp.mean(x, axis=axes, keepdims=True)
    centred = x - mean
    var = jnp.mean(jnp.square(centred), axis=axes, keepdims=True)
    return centred * jax.lax.rsqrt(var + eps)


def _affine(y, scale, bias):
    shape = (1,) * (y.ndim - 1) + (-1,)
    return y * scale.reshape(shape) + bias.reshape(shape)


def _scale_and_bias(module):
    """Returns both, float32 "C"; the bias may be 0."""
    scale = module.get_variable("params", "scale")
    bias = jnp.zeros_like(scale)
    if module.use_bias:
        bias = module.get_variable("params", "bias")
    return scale.astype(jnp.float32), bias.astype(jnp.float32)


def _norm_dtype(module, x):
    if module.dtype is not None:
        return module.dtype
    return jnp.result_type(x, module.get_variable("params", "scale"))


def _group_norm(module, x, kernels):
    in_transformer = isinstance(module.parent, attention_flax.FlaxTransformer2DModel)
    eps = 1e-6 if in_transformer else module.epsilon
    groups, (B, *positions, C) = module.num_groups, x.shape
    scale, bias = _scale_and_bias(module)
    x_BNC = x.astype(jnp.float32).reshape(B, math.prod(positions), C)
    if kernels.sums_by_matmul:
        y = norms.group_norm(x_BNC, scale, bias, groups, eps)
    else:
        grouped = x_BNC.reshape(B, -1, groups, C // groups)
        y = _standardise(grouped, (1, 3), eps).reshape(x_BNC.shape)
        y = _affine(y, scale, bias)
    return y.reshape(x.shape).astype(_norm_dtype(module, x))


def _layer_norm(module, x, kernels):
    scale, bias = _scale_and_bias(module)
    y = x.astype(jnp.float32)
    if kernels.sums_by_matmul:
        y = norms.layer_norm(y.reshape(-1, y.shape[-1]), scale, bias, module.epsilon)
    else:
        y = _affine(_standardise(y, (-1,), module.epsilon), scale, bias)
    return y.reshape(x.shape).astype(_norm_dtype(module, x))


def _geglu(module, x, deterministic=True, *, kernels):
    linear, gate = _halves(module.proj, x, kernels)
    gated = linear * kernels.gelu(gate)
    return module.dropout_layer(gated, deterministic=deterministic)


def _halves(dense, x, kernels):
    """Returns both halves of the channels that a dense layer makes.

    On CPUs the layer is halved where it is the smaller; its gradient is one of halves,
    which need not be joined and turned around.
    """
    rows, channels = math.prod(x.shape[:-1]), x.shape[-1]
    if kernels.device != "cpu" or rows < channels:
        return jnp.split(dense(x), 2, axis=-1)
    kernel, bias = (dense.variables["params"][name] for name in ("kernel", "bias"))
    x, kernel, bias = dense.promote_dtype(x, kernel, bias, dtype=dense.dtype)
    halves = zip(jnp.split(kernel, 2, axis=-1), jnp.split(bias, 2), strict=True)
    return [x @ k + jnp.broadcast_to(b, (*x.shape[:-1], *b.shape)) for k, b in halves]


def _timesteps(module, t_B):
    half = module.dim // 2
    exponent = np.float32(-math.log(1e4)) * np.arange(half, dtype=np.float32)
    exponent = exponent / np.float32(half - module.freq_shift)
    frequency = np.exp(exponent)[None, :]
    phase = t_B.astype(jnp.float32)[:, None] * frequency
    parts = [jnp.sin(phase), jnp.cos(phase)]
    if module.flip_sin_to_cos:
        parts.reverse()
    return jnp.concatenate(parts, axis=-1)


def _layer_scale(module, x_BLD):
    return x_BLD * module.get_variable("params", "lambda1").reshape(1, 1, -1)


def _upsample(module, x):
    B, H, W, C = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (B, H, 2, W, 2, C))
    return module.conv(x.reshape(B, 2 * H, 2 * W, C))


def _pair(value):
    if value is None:
        return (1, 1)
    return (value, value) if isinstance(value, int) else tuple(value)


def _padding(module):
    if module.padding == "VALID":
        return ((0, 0), (0, 0))
    if isinstance(module.padding, str):
        return None
    if isinstance(module.padding, int):
        return (_pair(module.padding),) * 2
    return tuple(_pair(p) for p in module.padding)


def _attention(module, x_BNC, context=None, deterministic=True, *, kernels, text):
    """Self-attention; or, with a context "B M C", attention to it.

    Args: text: (keys, values) of the context, "B M HD", or None: they are projected.
    """

    def heads(a):
        return a.reshape(*a.shape[:2], module.heads, module.dim_head)

    if text is None:
        source = x_BNC if context is None else context
        text = module.key(source), module.value(source)
    out = kernels.attend(heads(module.query(x_BNC)), *map(heads, text))
    out = module.proj_attn(out.reshape(x_BNC.shape[0], x_BNC.shape[1], -1))
    return module.dropout_layer(out, deterministic=deterministic)


def _conv(module, x_BHWC, kernels):
    """Returns a convolution as one matrix product, or None if XLA is to compute it."""
    padding, stride = _padding(module), _pair(module.strides)
    plain = (
        len(module.kernel_size) == 2
        and x_BHWC.ndim == 4
        and module.feature_group_count == 1
        and _pair(module.input_dilation) == (1, 1)
        and _pair(module.kernel_dilation) == (1, 1)
        and padding is not None
    )
    weight = module.get_variable("params", "kernel")
    if not plain or not kernels.takes_matmul(x_BHWC.shape, weight.shape, stride):
        return None
    bias = module.get_variable("params", "bias") if module.use_bias else None
    arrays = module.promote_dtype(x_BHWC, weight, bias, dtype=module.dtype)
    return conv_as_matmul(*arrays, stride, padding)


_CORRECTED = {
    embeddings_flax.FlaxTimesteps: _timesteps,
    modeling_flax_dinov2.FlaxDinov2LayerScale: _layer_scale,
    resnet_flax.FlaxUpsample2D: _upsample,
    vae_flax.FlaxUpsample2D: _upsample,
}
_CORRECTED_NORMS = {nn.GroupNorm: _group_norm, nn.LayerNorm: _layer_norm}


def _up_block(
    module,
    hidden_states,
    res_hidden_states_tuple,
    temb,
    encoder_hidden_states=None,
    deterministic=True,
):
    """diffusers' up blocks; each resnet joins what comes from below and the skip.

    So that only their parts are kept for the way back.
    """
    skips = list(res_hidden_states_tuple)
    attentions = getattr(module, "attentions", [None] * len(module.resnets))
    for resnet, attention in zip(module.resnets, attentions, strict=True):
        parts = hidden_states, skips.pop()
        hidden_states = resnet(parts, temb, deterministic=deterministic)
        if attention is not None:
            hidden_states = attention(
                hidden_states, encoder_hidden_states, deterministic=deterministic
            )
    if module.add_upsample:
        hidden_states = module.upsamplers_0(hidden_states)
    return hidden_states


_BLOCKS = (
    resnet_flax.FlaxResnetBlock2D,
    attention_flax.FlaxTransformer2DModel,
    # which compute nothing again, but turn their kernels around on the way back
    resnet_flax.FlaxDownsample2D,
    resnet_flax.FlaxUpsample2D,
)
_UP_STAGES = (
    unet_2d_blocks_flax.FlaxCrossAttnUpBlock2D,
    unet_2d_blocks_flax.FlaxUpBlock2D,
)
_STAGES = (
    *_UP_STAGES,
    unet_2d_blocks_flax.FlaxCrossAttnDownBlock2D,
    unet_2d_blocks_flax.FlaxDownBlock2D,
    unet_2d_blocks_flax.FlaxUNetMidBlock2DCrossAttn,
)
_COMPUTED_AGAIN = {"none": (), "block": _BLOCKS, "full": _BLOCKS + _STAGES}


def _takes_parts(module, args) -> bool:
    """Says whether a layer's memory is worth computing it for parts of the tokens."""
    tokenwise = isinstance(module, attention_flax.FlaxFeedForward) or (
        isinstance(module, attention_flax.FlaxAttention) and len(args) > 1  # a context
    )
    return tokenwise and kernels.parts_of(args[0].shape[1]) > 1


@contextlib.contextmanager
def exact(kernels=Kernels(), capture=(), hiddens=None, text=None):  # noqa: B008
    """Within this context Flax modules compute what their PyTorch namesakes compute.

    Args:
      kernels: how; say its platform where a program is compiled for another device.
      capture: kinds of layers whose outputs to collect, of `CAPTURE_KINDS`.
      hiddens: dict that receives them, "path/of/the/module" -> array.
      text: "path/of/the/attention" -> (keys, values), see `project_text`.
    Raises: ValueError for an unknown capture.
    Source: diffusers `models/attention.py`, `resnet.py`, `embeddings.py`.
    """
    unknown = [kind for kind in capture if kind not in CAPTURE_KINDS]
    if unknown:
        choices = ", ".join(CAPTURE_KINDS)
        raise ValueError(f"capture={unknown[0]!r} must be one of {choices}")
    wanted = tuple(cls for kind in capture for cls in CAPTURE_KINDS[kind])
    again = _COMPUTED_AGAIN[kernels.remat]
    above = ()  # the path of the block or stage that is being computed on its own

    def path_of(module):
        return "/".join(above + module.path)

    def compute(next_fun, args, kwargs, module):
        cls = type(module)
        if again and cls in _UP_STAGES:
            return _up_block(module, *args, **kwargs)
        if again and module.path and _takes_parts(module, args):
            return by_parts(module, args, kwargs)
        if cls is attention_flax.FlaxAttention:
            known = (text or {}).get(path_of(module))
            return _attention(module, *args, **kwargs, kernels=kernels, text=known)
        if cls in _CORRECTED:
            return _CORRECTED[cls](module, *args, **kwargs)
        if cls is attention_flax.FlaxGEGLU:
            return _geglu(module, *args, **kwargs, kernels=kernels)
        if cls in _CORRECTED_NORMS and module.has_variable("params", "scale"):
            return _CORRECTED_NORMS[cls](module, *args, kernels=kernels, **kwargs)
        if cls is nn.Conv and module.has_variable("params", "kernel"):
            out = _conv(module, args[0], kernels)
            if out is not None:
                return out
        return next_fun(*args, **kwargs)

    def apart(module, kwargs):
        """Returns (what the module computes of (variables, args), its variables).

        What that gives is (output, hiddens found within).
        """
        path = above + module.path

        def compute_it(params, args):
            nonlocal above, hiddens
            outside = above, hiddens
            above, hiddens = path, {}
            try:
                first, *others = args
                if isinstance(first, tuple):  # of `_up_block`
                    first = jnp.concatenate(first, axis=-1)
                it = module.clone(parent=None)
                return it.apply(params, first, *others, **kwargs), hiddens
            finally:
                above, hiddens = outside

        return compute_it, {"params": module.variables["params"]}

    def alone(module, args, kwargs):
        """Computes a block or stage, of which its inputs alone are kept.

        On the way back it is computed again, not before the gradient of its output is
        there, so that two blocks are never in memory at once.
        """
        compute_it, params = apart(module, kwargs)
        out, found = jax.checkpoint(compute_it)(params, args)
        if found:
            hiddens.update(found)
        return out

    def by_parts(module, args, kwargs):
        """Computes a layer that treats tokens alike for some of them at a time."""
        compute_it, params = apart(module, kwargs)
        x_BNC, *others = args

        def compute_part(given, part):
            params, others = given
            return compute_it(params, (part, *others))[0]

        return kernels.in_turn(compute_part, (params, others), x_BNC)

    def call(next_fun, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        if isinstance(module, again) and module.path:  # not yet alone
            return alone(module, args, kwargs)
        out = compute(next_fun, args, kwargs, module)
        if wanted and isinstance(module, wanted):
            hiddens[path_of(module)] = out
        return out

    with nn.intercept_methods(call):
        yield


# --- applying -------------------------------------------------------------------------


def project_text(unet, params, c_BLD):
    """Returns the keys and values of the text states, for `apply_unet`'s `text`.

    For many calls on the same prompts with the same weights: each call then leaves out
    the projections. Args: see `apply_unet`. Returns: "path/of/the/attention" -> (keys,
    values), "B L HD" each.
    """
    flat = flatten_dict(params, sep="/")
    c_BLD = c_BLD.astype(unet.dtype)
    suffix = "/attn2/to_k/kernel"
    found = {}
    for path in flat:
        if path.endswith(suffix):
            layer = path.removesuffix("/to_k/kernel")
            weights = (flat[f"{layer}/to_{kind}/kernel"] for kind in "kv")
            found[layer] = tuple(c_BLD @ w.astype(unet.dtype) for w in weights)
    return found


def apply_unet(
    unet,
    params,
    z_BCHW,
    t_B,
    c_BLD,
    capture=(),
    kernels=Kernels(),  # noqa: B008
    text=None,
):
    """Returns (the UNet's output, captured hidden states). Pure and jittable.

    Args:
      unet, params: from `build_unet` and its (nested) parameters.
      z_BCHW: "B C H W", noised latents. t_B: int or float "B", timesteps.
      c_BLD: "B L D", text states.
      capture: kinds of `CAPTURE_KINDS` to collect: "transformer" gives "B HW D".
      kernels: how the layers are computed. text: from `project_text`, or None.
    Returns: (output "B C H W" in the module's dtype, dict path -> array; the paths are
      those of the parameters, e.g. "mid_block/attentions_0/transformer_blocks_0").
    """

    hiddens = {}
    t_B = jnp.asarray(t_B)  # the module takes a NumPy array for a scalar
    args = z_BCHW, t_B, c_BLD
    with exact(kernels, capture, hiddens, text):
        out = unet.apply({"params": params}, *args, return_dict=False)[0]
    return out, hiddens


def apply_vae_encode(vae, params, x_BCHW, kernels=Kernels()):  # noqa: B008
    """Returns (mean, logvar) of the posterior, "B C h w" each, not yet scaled.

    Args: x_BCHW: "B 3 H W" in [-1, 1]. The caller multiplies by `scaling_factor`.
    """
    with exact(kernels):
        posterior = vae.apply({"params": params}, x_BCHW, method=vae.encode).latent_dist
    mean = jnp.transpose(posterior.mean, (0, 3, 1, 2))
    logvar = jnp.transpose(posterior.logvar, (0, 3, 1, 2))
    return mean, logvar


def apply_vae_decode(vae, params, z_BCHW, kernels=Kernels()):  # noqa: B008
    """Returns images "B 3 H W", about [-1, 1], of latents already unscaled."""
    z_BHWC = jnp.transpose(z_BCHW, (0, 2, 3, 1))
    with exact(kernels):
        return vae.apply({"params": params}, z_BHWC, method=_decode_channels_last)


def _decode_channels_last(vae, z_BHWC):
    # `FlaxAutoencoderKL.decode` guesses the layout from the last axis; this does not.
    x_BHWC = vae.decoder(vae.post_quant_conv(z_BHWC))
    return jnp.transpose(x_BHWC, (0, 3, 1, 2))


def apply_text(text, params, ids_BL, mask_BL=None):
    """Returns (last hidden states "B L D" after the final norm, pooled "B D").

    Args: ids_BL: int32 "B L". mask_BL: None attends to padding too, as Stable
      Diffusion does.
    """
    position_ids = jnp.arange(ids_BL.shape[1], dtype=jnp.int32)[None, :]
    with exact():
        out = text.apply({"params": params}, ids_BL, mask_BL, position_ids)
    return out.last_hidden_state, out.pooler_output


def apply_clip_text(clip, params, ids_BL, mask_BL=None):
    """Returns a two-tower CLIP's projected text embeddings, "B D", not normalised."""

    def project(module, ids, mask, positions):
        pooled = module.text_model(ids, mask, positions).pooler_output
        return module.text_projection(pooled)

    position_ids = jnp.arange(ids_BL.shape[1], dtype=jnp.int32)[None, :]
    with exact():
        return clip.apply(
            {"params": params}, ids_BL, mask_BL, position_ids, method=project
        )


def apply_clip_image(clip, params, x_BCHW, kernels=Kernels()):  # noqa: B008
    """Returns the projected image embeddings, "B D", not normalised.

    Args: x_BCHW: "B 3 H W", normalised as the model's preprocessor says.
    """

    def project(module, x_BHWC):
        return module.visual_projection(module.vision_model(x_BHWC).pooler_output)

    x_BHWC = jnp.transpose(x_BCHW, (0, 2, 3, 1))
    with exact(kernels):
        return clip.apply({"params": params}, x_BHWC, method=project)


def apply_vision(vision, params, x_BCHW, kernels=Kernels()):  # noqa: B008
    """Returns a ViT's or DINOv2's class token after the final norm, "B D".

    Args: x_BCHW: "B 3 H W", normalised, H and W the config's image_size.
    """
    x_BHWC = jnp.transpose(x_BCHW, (0, 2, 3, 1))
    with exact(kernels):
        return vision.apply({"params": params}, x_BHWC).last_hidden_state[:, 0]


def apply_classifier(classifier, params, x_BCHW, kernels=Kernels()):  # noqa: B008
    """Returns an image classifier's logits, "B N" of N labels.

    Args: params: as `init_params` has them, the running statistics of batch norms
      among them, which are used as they are. x_BCHW: "B 3 H W", normalised.
    """
    x_BHWC = jnp.transpose(x_BCHW, (0, 2, 3, 1))
    with exact(kernels):
        return classifier.apply(_split_statistics(params), x_BHWC).logits
