# SPDX-License-Identifier: Apache-2.0
"""Vision transformers: ViT (and DINO), with a classifier or without, and DINOv2.

Parameters are named as in transformers. Axes: B batch, H height, W width, L tokens, the
class token first, D width.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from gift_jax.models.ops.activations import ACTIVATIONS
from gift_jax.models.ops.kernels import Kernels
from gift_jax.models.ops.layers import Chain, Conv, LayerNorm
from gift_jax.models.params import from_config

_START = nn.initializers.truncated_normal(0.02)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The fields of a ViT's config.json that change what is computed.

    Attributes: num_labels: of its classifier; 0 for none.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True
    num_labels: int = 0


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """The fields of a Dinov2Model's config.json that change what is computed."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    mlp_ratio: float = 4
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    use_mask_token: bool = True


class Embeddings(nn.Module):
    """Patches and a class token, with learned positions.

    Attributes: mask_token: whether there is one, which is read and not used.
    """

    config: Any
    mask_token: bool
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BHWC):
        config, B = self.config, len(x_BHWC)
        patch, width = config.patch_size, config.hidden_size
        fields = width, patch, patch, 0, True, self.dtype, self.kernels
        conv = functools.partial(Conv, *fields)
        embed = Chain((conv,), ("projection",), name="patch_embeddings")
        patches_BLD = embed(x_BHWC).reshape(B, -1, width)
        token_11D = self.param("cls_token", _START, (1, 1, width))
        if self.mask_token:
            self.param("mask_token", _START, (1, width))
        rows = (config.image_size // patch) ** 2 + 1
        positions_1LD = self.param("position_embeddings", _START, (1, rows, width))
        token_B1D = jnp.broadcast_to(token_11D, (B, 1, width)).astype(self.dtype)
        return jnp.concatenate([token_B1D, patches_BLD], axis=1) + positions_1LD


class SelfAttention(nn.Module):
    config: Any
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BLD):
        project = Projections(self.config, self.dtype, name="attention")
        out = self.kernels.attend(*project(x_BLD)).reshape(x_BLD.shape)
        dense = functools.partial(nn.Dense, x_BLD.shape[-1], dtype=self.dtype)
        return Chain((dense,), ("dense",), name="output")(out)


class Projections(nn.Module):
    """Queries, keys and values, "B L heads D" each."""

    config: Any
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD):
        use_bias = self.config.qkv_bias
        heads = (*x_BLD.shape[:2], self.config.num_attention_heads, -1)

        def project(name):
            width = x_BLD.shape[-1]
            dense = nn.Dense(width, use_bias=use_bias, dtype=self.dtype, name=name)
            return dense(x_BLD).reshape(heads)

        return [project(name) for name in ("query", "key", "value")]


class ViTLayer(nn.Module):
    config: ViTConfig
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BLD):
        config, common = self.config, {"dtype": self.dtype, "kernels": self.kernels}
        norm = functools.partial(LayerNorm, config.layer_norm_eps, **common)
        attention = SelfAttention(config, **common, name="attention")
        x_BLD = x_BLD + attention(norm(name="layernorm_before")(x_BLD))
        h_BLD = norm(name="layernorm_after")(x_BLD)
        for name, width in (
            ("intermediate", config.intermediate_size),
            ("output", config.hidden_size),
        ):
            dense = functools.partial(nn.Dense, width, dtype=self.dtype)
            h_BLD = Chain((dense,), ("dense",), name=name)(h_BLD)
            if name == "intermediate":
                h_BLD = ACTIVATIONS[config.hidden_act](h_BLD)
        return x_BLD + h_BLD


class Dinov2Layer(nn.Module):
    config: Dinov2Config
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BLD):
        config, common = self.config, {"dtype": self.dtype, "kernels": self.kernels}
        norm = functools.partial(LayerNorm, config.layer_norm_eps, **common)
        attention = SelfAttention(config, **common, name="attention")
        h_BLD = attention(norm(name="norm1")(x_BLD))
        x_BLD = x_BLD + LayerScale(name="layer_scale1")(h_BLD)
        feed_forward = SwiGLU if config.use_swiglu_ffn else MLP
        h_BLD = feed_forward(config, self.dtype, name="mlp")(norm(name="norm2")(x_BLD))
        return x_BLD + LayerScale(name="layer_scale2")(h_BLD)


class LayerScale(nn.Module):
    """Channels times learned factors. (transformers' Flax class, in error, multiplies
    them by the square of their initial value too.)"""

    @nn.compact
    def __call__(self, x_BLD):
        lambda_D = self.param("lambda1", nn.initializers.ones, x_BLD.shape[-1:])
        return x_BLD * lambda_D.reshape(1, 1, -1)


class MLP(nn.Module):
    config: Dinov2Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD):
        width = x_BLD.shape[-1]
        hidden = int(width * self.config.mlp_ratio)
        h = nn.Dense(hidden, dtype=self.dtype, name="fc1")(x_BLD)
        h = ACTIVATIONS[self.config.hidden_act](h)
        return nn.Dense(width, dtype=self.dtype, name="fc2")(h)


class SwiGLU(nn.Module):
    """Source: Shazeer 2020 (arXiv:2002.05202), eq. 6; the width is DINOv2's."""

    config: Dinov2Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD):
        width = x_BLD.shape[-1]
        hidden = int(int(width * self.config.mlp_ratio) * 2 / 3)
        hidden = (hidden + 7) // 8 * 8
        h = nn.Dense(2 * hidden, dtype=self.dtype, name="weights_in")(x_BLD)
        gate, linear = jnp.split(h, 2, axis=-1)
        dense = nn.Dense(width, dtype=self.dtype, name="weights_out")
        return dense(nn.silu(gate) * linear)


class VisionTransformer(nn.Module):
    """ViT or DINOv2: "B H W 3" -> the class token after the final norm, "B D"."""

    config: ViTConfig | Dinov2Config
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BHWC):
        config, common = self.config, (self.dtype, self.kernels)
        is_dino = isinstance(config, Dinov2Config)
        mask_token = is_dino and config.use_mask_token
        x_BLD = Embeddings(config, mask_token, *common, name="embeddings")(x_BHWC)
        layer = Dinov2Layer if is_dino else ViTLayer
        layer = functools.partial(layer, config, *common)
        layers = functools.partial(Chain, (layer,) * config.num_hidden_layers)
        x_BLD = Chain((layers,), ("layer",), name="encoder")(x_BLD)
        return LayerNorm(config.layer_norm_eps, *common, name="layernorm")(x_BLD[:, 0])

    def example_inputs(self):
        size = self.config.image_size
        return (jnp.zeros((1, size, size, self.config.num_channels)),)


class ViTClassifier(nn.Module):
    """ViT with a dense layer on its class token: "B H W 3" -> logits."""

    config: ViTConfig
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BHWC):
        vit = VisionTransformer(self.config, self.dtype, self.kernels, name="vit")
        dense = nn.Dense(self.config.num_labels, dtype=self.dtype, name="classifier")
        return dense(vit(x_BHWC))

    def example_inputs(self):
        size = self.config.image_size
        return (jnp.zeros((1, size, size, self.config.num_channels)),)


def build_vit(config: dict, dtype=jnp.float32, kernels: Kernels | None = None):
    """Returns the module, without a pooler, for a ViTModel's `config.json` dict."""
    config = from_config(ViTConfig, config)
    return VisionTransformer(config, dtype, kernels or Kernels())


def build_dinov2(config: dict, dtype=jnp.float32, kernels: Kernels | None = None):
    """Returns the module for a Dinov2Model's `config.json` dict."""
    config = from_config(Dinov2Config, config)
    return VisionTransformer(config, dtype, kernels or Kernels())


def build_vit_classifier(
    config: dict, dtype=jnp.float32, kernels: Kernels | None = None
):
    """Returns the module for a ViTForImageClassification's `config.json` dict."""
    config = from_config(ViTConfig, config, num_labels=num_labels(config))
    return ViTClassifier(config, dtype, kernels or Kernels())


def num_labels(config: dict) -> int:
    """Returns the number of a classifier's labels, as transformers counts them."""
    names = config.get("id2label")
    return len(names) if names else config.get("num_labels", 2)


def apply_vision(vision: VisionTransformer, params, x_BCHW):
    """Returns a ViT's or DINOv2's class token after the final norm, "B D".

    Args: x_BCHW: "B 3 H W", normalized, H and W the config's image_size.
    """
    return vision.apply({"params": params}, jnp.transpose(x_BCHW, (0, 2, 3, 1)))
