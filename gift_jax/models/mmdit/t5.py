# SPDX-License-Identifier: Apache-2.0
"""The encoder of T5 1.1, Stable Diffusion 3's third text encoder.

Parameters are named as in transformers. Axes: B batch, L tokens, D width, H heads.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gift_jax.models.mmdit.layers import RMSNorm
from gift_jax.models.ops.activations import ACTIVATIONS
from gift_jax.models.params import from_config

ACTIVATION = "gelu_new"  # what "gated-gelu" means


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The fields of a T5EncoderModel's config.json that change what is computed."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


def position_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Returns int "L L": which bias a query's row has for a key's column.

    Half of the buckets are for keys after the query. Of each half, half are for one
    distance each, the others for distances that grow as powers do.

    Source: Raffel et al. 2020 (arXiv:1910.10683), section 2.1; transformers
      `T5Attention._relative_position_bucket`.
    """
    half = buckets // 2
    exact = half // 2
    place = np.arange(length)
    offset = place[None, :] - place[:, None]
    distance = np.abs(offset)
    # in float32, as there: a distance that is a power lies at a bucket's edge
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    grown = np.log(ratio) / np.float32(math.log(max_distance / exact))
    grown = exact + (grown * np.float32(half - exact)).astype(np.int64)
    bucket = np.where(distance < exact, distance, np.minimum(grown, half - 1))
    return bucket + half * (offset > 0)


class SelfAttention(nn.Module):
    """Attention whose scores are not scaled and get a bias by distance.

    Attributes: has_bias: whether the table of biases is here, as in the first layer.
    """

    config: T5Config
    has_bias: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD, bias_HLL):
        """Returns (attention "B L D", biases). Args: bias_HLL: where none are here."""
        config, (B, L, D) = self.config, x_BLD.shape
        if self.has_bias:
            bias_HLL = self.bias(L)
        heads = config.num_heads

        def project(name):
            width = heads * config.d_kv
            return _dense(width, self.dtype, name)(x_BLD).reshape(B, L, heads, -1)

        q, k, v = map(project, ("q", "k", "v"))
        scores = jnp.einsum("blhd,bmhd->bhlm", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores + bias_HLL[None].astype(jnp.float32), axis=-1)
        out = jnp.einsum("bhlm,bmhd->blhd", weights.astype(v.dtype), v)
        return _dense(D, self.dtype, "o")(out.reshape(B, L, -1)), bias_HLL

    def bias(self, length):
        config = self.config
        buckets = config.relative_attention_num_buckets
        furthest = config.relative_attention_max_distance
        table = nn.Embed(buckets, config.num_heads, name="relative_attention_bias")
        bias_LLH = table(position_buckets(length, buckets, furthest))
        return jnp.transpose(bias_LLH, (2, 0, 1))


class GatedDense(nn.Module):
    """A dense layer's GELU times another dense layer, and a third.

    Source: Shazeer 2020 (arXiv:2002.05202), eq. 6; GELU by tanh.
    """

    config: T5Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD):
        gate, linear = (
            _dense(self.config.d_ff, self.dtype, name)(x_BLD)
            for name in ("wi_0", "wi_1")
        )
        h = ACTIVATIONS[ACTIVATION](gate) * linear
        return _dense(x_BLD.shape[-1], self.dtype, "wo")(h)


def _dense(features, dtype, name):
    return nn.Dense(features, use_bias=False, dtype=dtype, name=name)


class AttentionLayer(nn.Module):
    config: T5Config
    has_bias: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD, bias_HLL):
        attend = SelfAttention(
            self.config, self.has_bias, self.dtype, name="SelfAttention"
        )
        h_BLD = _norm(self.config, self.dtype, "layer_norm")(x_BLD)
        h_BLD, bias_HLL = attend(h_BLD, bias_HLL)
        return x_BLD + h_BLD, bias_HLL


class FeedForwardLayer(nn.Module):
    config: T5Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD):
        h_BLD = _norm(self.config, self.dtype, "layer_norm")(x_BLD)
        return x_BLD + GatedDense(self.config, self.dtype, name="DenseReluDense")(h_BLD)


def _norm(config, dtype, name):
    return RMSNorm(config.layer_norm_epsilon, dtype, name=name)


class Block(nn.Module):
    config: T5Config
    is_first: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD, bias_HLL):
        fields = self.config, self.is_first, self.dtype
        x_BLD, bias_HLL = AttentionLayer(*fields, name="layer_0")(x_BLD, bias_HLL)
        return FeedForwardLayer(self.config, self.dtype, name="layer_1")(
            x_BLD
        ), bias_HLL


class Stack(nn.Module):
    config: T5Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD):
        bias_HLL = None
        for i in range(self.config.num_layers):
            block = Block(self.config, i == 0, self.dtype, name=f"block_{i}")
            x_BLD, bias_HLL = block(x_BLD, bias_HLL)
        return _norm(self.config, self.dtype, "final_layer_norm")(x_BLD)


class T5Encoder(nn.Module):
    """The encoder. Padding is attended to, as Stable Diffusion 3 does."""

    config: T5Config
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids_BL):
        """Returns the last hidden states, "B L D"."""
        rows, width = self.config.vocab_size, self.config.d_model
        x_BLD = nn.Embed(rows, width, name="shared")(ids_BL.astype(jnp.int32))
        return Stack(self.config, self.dtype, name="encoder")(x_BLD)

    def example_inputs(self):
        return (jnp.zeros((1, 2), jnp.int32),)


def build_t5(config: dict, dtype=jnp.float32) -> T5Encoder:
    """Returns the module of a `text_encoder_3/config.json` dict."""
    return T5Encoder(from_config(T5Config, config), dtype)


def apply_t5(module: T5Encoder, params, ids_BL):
    """Returns the last hidden states, "B L D". Args: params: nested. ids_BL: int."""
    return module.apply({"params": params}, ids_BL)
