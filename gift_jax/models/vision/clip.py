# SPDX-License-Identifier: Apache-2.0
"""CLIP with both towers: a vision transformer's, or a small convolutional one.

Axes: B batch, H height, W width, L tokens, D width.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from gift_jax.models.ops.kernels import Kernels
from gift_jax.models.ops.layers import Conv, GroupNorm, LayerNorm
from gift_jax.models.params import from_config
from gift_jax.models.sd.clip import CLIPTextConfig, TextTransformer, encoder


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """The fields of a config.json's vision_config that change what is computed.

    Attributes: conv_channels: of a convolutional tower's stem and stages; () for a
      vision transformer.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    conv_channels: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """The fields of a CLIPModel's config.json that change what is computed."""

    text_config: CLIPTextConfig
    vision_config: CLIPVisionConfig
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592


class VisionTransformer(nn.Module):
    """CLIP's own image tower: "B H W 3" -> the class token "B D"."""

    config: CLIPVisionConfig
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BHWC):
        common = {"dtype": self.dtype, "kernels": self.kernels}
        norm = functools.partial(LayerNorm, self.config.layer_norm_eps, **common)
        x_BLD = VisionEmbeddings(self.config, **common, name="embeddings")(x_BHWC)
        x_BLD = norm(name="pre_layrnorm")(x_BLD)  # its name on disk
        x_BLD, _ = encoder(self.config, False, self.dtype, self.kernels)(x_BLD)
        return norm(name="post_layernorm")(x_BLD[:, 0])


class VisionEmbeddings(nn.Module):
    config: CLIPVisionConfig
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BHWC):
        config, start = self.config, nn.initializers.normal()
        patch, width = config.patch_size, config.hidden_size
        common = {"use_bias": False, "dtype": self.dtype, "kernels": self.kernels}
        conv = Conv(width, patch, patch, **common, name="patch_embedding")
        patches_BLD = conv(x_BHWC).reshape(len(x_BHWC), -1, width)
        token_D = self.param("class_embedding", start, (width,))
        token_B1D = jnp.broadcast_to(token_D, (len(x_BHWC), 1, width))
        x_BLD = jnp.concatenate([token_B1D.astype(self.dtype), patches_BLD], axis=1)
        rows = (config.image_size // patch) ** 2 + 1
        positions = nn.Embed(
            rows, width, embedding_init=start, name="position_embedding"
        )
        return x_BLD + positions(jnp.arange(rows)[None])


class ConvTower(nn.Module):
    """Residual stages, each at half the size, read out place by place.

    For small images and little data: learned from a few thousand images a vision
    transformer recognizes nothing where convolutions do.

    Attributes: channels: of the stem and of the stages. Returns: of "B H W 3", "B D",
      D = places x channels of the last stage.
    """

    channels: tuple[int, ...]
    groups: int = 8
    kernels: Kernels = Kernels()

    def __call__(self, x_BHWC):
        return self.stages(x_BHWC)[-1]

    @nn.compact
    def stages(self, x_BHWC):
        """Returns the outputs of the stem and of the stages, and what is read out."""
        stem, *channels = self.channels
        x_BHWC = nn.silu(nn.Conv(stem, (5, 5), (2, 2), name="stem")(x_BHWC))
        outputs = [x_BHWC]
        for i, width in enumerate(channels):
            x_BHWC = nn.Conv(width, (3, 3), (2, 2), name=f"down_{i}")(x_BHWC)
            h_BHWC = x_BHWC
            for j in range(2):
                h_BHWC = nn.silu(self.norm(f"norm_{i}_{j}")(h_BHWC))
                h_BHWC = nn.Conv(width, (3, 3), name=f"conv_{i}_{j}")(h_BHWC)
            x_BHWC = x_BHWC + h_BHWC
            outputs.append(x_BHWC)
        features_BHWC = nn.silu(self.norm("norm")(x_BHWC))
        return [*outputs, features_BHWC.reshape(len(x_BHWC), -1)]

    def norm(self, name):
        return GroupNorm(self.groups, 1e-6, kernels=self.kernels, name=name)


class CLIP(nn.Module):
    """The two towers and their projections."""

    config: CLIPConfig
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    def setup(self):
        config, common = self.config, {"dtype": self.dtype, "kernels": self.kernels}
        self.text_model = TextTransformer(config.text_config, **common)
        if channels := config.vision_config.conv_channels:
            self.vision_model = ConvTower(channels, kernels=self.kernels)
        else:
            self.vision_model = VisionTransformer(config.vision_config, **common)
        dense = {"use_bias": False, "dtype": self.dtype}
        if not channels:
            dense["kernel_init"] = nn.initializers.normal(0.02)
        self.visual_projection = nn.Dense(config.projection_dim, **dense)
        self.text_projection = nn.Dense(config.projection_dim, **dense)
        start = nn.initializers.constant(config.logit_scale_init_value)
        self.logit_scale = self.param("logit_scale", start, ())

    def embed_images(self, x_BHWC):
        return self.visual_projection(self.vision_model(x_BHWC))

    def embed_text(self, ids_BL):
        return self.text_projection(self.text_model(ids_BL)[1])

    def stages(self, x_BHWC):
        """Returns the outputs of a convolutional tower's stem and stages."""
        return self.vision_model.stages(x_BHWC)[:-1]

    def __call__(self, ids_BL, x_BHWC):
        return self.embed_images(x_BHWC), self.embed_text(ids_BL)

    def example_inputs(self):
        size = self.config.vision_config.image_size
        return jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, size, size, 3))


def build_clip(config: dict, dtype=jnp.float32, kernels: Kernels | None = None) -> CLIP:
    """Returns the two-tower CLIP of a CLIPModel's `config.json` dict.

    With `conv_channels` in its vision_config its image tower is a `ConvTower`.
    """
    towers = {
        "text_config": from_config(CLIPTextConfig, config.get("text_config") or {}),
        "vision_config": from_config(
            CLIPVisionConfig, config.get("vision_config") or {}
        ),
    }
    config = from_config(CLIPConfig, config, **towers)
    return CLIP(config, dtype, kernels or Kernels())


def apply_clip_text(clip: CLIP, params, ids_BL):
    """Returns the projected text embeddings, "B D", not normalized."""
    return clip.apply({"params": params}, ids_BL, method=clip.embed_text)


def apply_clip_image(clip: CLIP, params, x_BCHW):
    """Returns the projected image embeddings, "B D", not normalized.

    Args: x_BCHW: "B 3 H W", normalized as the model's preprocessor says.
    """
    x_BHWC = jnp.transpose(x_BCHW, (0, 2, 3, 1))
    return clip.apply({"params": params}, x_BHWC, method=clip.embed_images)


def apply_clip_stages(clip: CLIP, params, x_BHWC):
    """Returns a convolutional image tower's stages, "B H W C" each.

    Args: x_BHWC: normalized as for `apply_clip_image`.
    """
    return clip.apply({"params": params}, x_BHWC, method=clip.stages)
