# SPDX-License-Identifier: Apache-2.0
"""CLIP's text encoders, and the transformer layers that both of CLIP's towers have.

Axes: B batch, L tokens, D width.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gift_jax.models.ops.activations import ACTIVATIONS
from gift_jax.models.ops.attention import attention_reference
from gift_jax.models.ops.kernels import Kernels
from gift_jax.models.ops.layers import Chain, LayerNorm
from gift_jax.models.params import from_config

_LEGACY_EOS = 2  # of configs older than transformers 4.31


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """The fields of a CLIPTextModel's config.json that change what is computed."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407


@dataclasses.dataclass(frozen=True)
class ProjectedCLIPTextConfig(CLIPTextConfig):
    """The same of a CLIPTextModelWithProjection's."""

    projection_dim: int = 512


class TextOutput(NamedTuple):
    """What a text encoder returns.

    Attributes: last: hidden states after the final norm, "B L D". pooled: of these the
      end token's, "B D", or its projection, "B P". penultimate: what the last layer
      reads, "B L D", without a norm.
    """

    last: jax.Array
    pooled: jax.Array
    penultimate: jax.Array


class EncoderLayer(nn.Module):
    """Self-attention and two dense layers.

    Attributes: config: of either tower. causal: whether tokens see earlier ones alone.
    """

    config: Any
    causal: bool
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BLD):
        common = {"dtype": self.dtype, "kernels": self.kernels}
        attention = SelfAttention(self.config, self.causal, **common, name="self_attn")
        norm = functools.partial(LayerNorm, self.config.layer_norm_eps, **common)
        x_BLD = x_BLD + attention(norm(name="layer_norm1")(x_BLD))
        mlp = MLP(self.config, self.dtype, name="mlp")
        return x_BLD + mlp(norm(name="layer_norm2")(x_BLD))


class SelfAttention(nn.Module):
    config: Any
    causal: bool
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BLD):
        def dense(name):
            return _dense(x_BLD.shape[-1], self.dtype, name)

        heads = (*x_BLD.shape[:2], self.config.num_attention_heads, -1)
        names = ("q_proj", "k_proj", "v_proj")
        q, k, v = (dense(name)(x_BLD).reshape(heads) for name in names)
        attend = self.kernels.attend
        if self.causal:
            attend = functools.partial(attention_reference, causal=True)
        return dense("out_proj")(attend(q, k, v).reshape(x_BLD.shape))


class MLP(nn.Module):
    config: Any
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD):
        h = _dense(self.config.intermediate_size, self.dtype, "fc1")(x_BLD)
        h = ACTIVATIONS[self.config.hidden_act](h)
        return _dense(x_BLD.shape[-1], self.dtype, "fc2")(h)


def _dense(features, dtype, name):
    start = nn.initializers.normal(0.01)
    return nn.Dense(features, dtype=dtype, kernel_init=start, name=name)


def encoder(config, causal: bool, dtype, kernels: Kernels) -> nn.Module:
    """Returns a tower's layers, named "encoder/layers/0" and so on.

    They return (the last one's output, its input).
    """
    layers = functools.partial(EncoderLayers, config, causal, dtype, kernels)
    return Chain((layers,), ("layers",), name="encoder")


class EncoderLayers(nn.Module):
    config: Any
    causal: bool
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BLD):
        before_BLD = x_BLD
        fields = self.config, self.causal, self.dtype, self.kernels
        for i in range(self.config.num_hidden_layers):
            before_BLD = x_BLD
            x_BLD = EncoderLayer(*fields, name=str(i))(x_BLD)
        return x_BLD, before_BLD


class TextTransformer(nn.Module):
    """The text tower."""

    config: CLIPTextConfig
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, ids_BL):
        config = self.config
        x_BLD = Embeddings(config, name="embeddings")(ids_BL)
        x_BLD, penultimate_BLD = encoder(config, True, self.dtype, self.kernels)(x_BLD)
        fields = config.layer_norm_eps, self.dtype, self.kernels
        x_BLD = LayerNorm(*fields, name="final_layer_norm")(x_BLD)
        # Before transformers 4.31 configs gave a wrong id, 2, and CLIP was pooled at
        # the largest. What was trained so is still used so.
        legacy = config.eos_token_id == _LEGACY_EOS
        at_end = ids_BL if legacy else ids_BL == config.eos_token_id
        pooled_BD = x_BLD[jnp.arange(len(x_BLD)), at_end.argmax(axis=-1)]
        return TextOutput(x_BLD, pooled_BD, penultimate_BLD)


class Embeddings(nn.Module):
    config: CLIPTextConfig

    @nn.compact
    def __call__(self, ids_BL):
        config = self.config
        start = {"embedding_init": nn.initializers.normal()}
        rows, width = config.vocab_size, config.hidden_size
        tokens = nn.Embed(rows, width, **start, name="token_embedding")
        rows = config.max_position_embeddings
        positions = nn.Embed(rows, width, **start, name="position_embedding")
        index = jnp.arange(ids_BL.shape[1], dtype=jnp.int32)[None]
        return tokens(ids_BL.astype(jnp.int32)) + positions(index)


class TextEncoder(nn.Module):
    """Stable Diffusion's text encoder: the tower, named as on disk.

    Padding is attended to, as Stable Diffusion was trained.
    """

    config: CLIPTextConfig
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, ids_BL):
        fields = self.config, self.dtype, self.kernels
        return TextTransformer(*fields, name="text_model")(ids_BL)

    def example_inputs(self):
        return (jnp.zeros((1, 2), jnp.int32),)


class ProjectedTextEncoder(TextEncoder):
    """The same with a projection of what is pooled: SDXL's second."""

    config: ProjectedCLIPTextConfig

    @nn.compact
    def __call__(self, ids_BL):
        fields = self.config, self.dtype, self.kernels
        out = TextTransformer(*fields, name="text_model")(ids_BL)
        project = nn.Dense(
            self.config.projection_dim,
            use_bias=False,
            dtype=self.dtype,
            name="text_projection",
        )
        return out._replace(pooled=project(out.pooled))


def build_text(
    config: dict, dtype=jnp.float32, kernels: Kernels | None = None
) -> TextEncoder:
    """Returns the module of a `text_encoder/config.json` dict."""
    config = from_config(CLIPTextConfig, config)
    return TextEncoder(config, dtype, kernels or Kernels())


def build_projected_text(
    config: dict, dtype=jnp.float32, kernels: Kernels | None = None
) -> ProjectedTextEncoder:
    """Returns the module of a `text_encoder_2/config.json` dict."""
    config = from_config(ProjectedCLIPTextConfig, config)
    return ProjectedTextEncoder(config, dtype, kernels or Kernels())


def apply_text(text: TextEncoder, params, ids_BL) -> TextOutput:
    """Returns a text encoder's output. Args: params: nested. ids_BL: int "B L"."""
    return text.apply({"params": params}, ids_BL)
