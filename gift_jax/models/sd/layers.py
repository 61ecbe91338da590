# SPDX-License-Identifier: Apache-2.0
"""The layers of Stable Diffusion's UNet and VAE.

Parameters have the names and shapes that diffusers' Flax classes gave them; what is
computed is what diffusers computes in PyTorch.

Axes: B batch, H height, W width, C channels, N positions, L text tokens, D their width.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from gift_jax.models.ops.activations import gelu
from gift_jax.models.ops.kernels import Kernels
from gift_jax.models.ops.layers import Conv, GroupNorm, LayerNorm

GROUPS = 32
_PART = 1024  # tokens, see `by_parts`


def timestep_features(t_B, dim: int, flip_sin_to_cos: bool, freq_shift: float):
    """Returns sines and cosines of timesteps, float32 "B dim".

    The frequencies are constants of the program: devices round exp differently.

    Source: diffusers `get_timestep_embedding`; Vaswani et al. 2017, section 3.5.
    """
    half = dim // 2
    exponent = np.float32(-math.log(1e4)) * np.arange(half, dtype=np.float32)
    frequency = np.exp(exponent / np.float32(half - freq_shift))[None, :]
    phase = t_B.astype(jnp.float32)[:, None] * frequency
    parts = [jnp.sin(phase), jnp.cos(phase)]
    return jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)


class TimestepEmbedding(nn.Module):
    """Two dense layers on timestep features."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features_BC):
        h_BC = nn.Dense(self.width, dtype=self.dtype, name="linear_1")(features_BC)
        return nn.Dense(self.width, dtype=self.dtype, name="linear_2")(nn.silu(h_BC))


class ResnetBlock(nn.Module):
    """Two convolutions beside a shortcut, with the timestep between if there is one.

    Attributes: channels: of the result.
    """

    channels: int
    eps: float = 1e-5
    groups: int = GROUPS
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BHWC, time_BC=None, skip_BHWC=None):
        """Args: skip_BHWC: joined to x here, so that remat keeps both parts alone."""
        if skip_BHWC is not None:
            x_BHWC = jnp.concatenate([x_BHWC, skip_BHWC], axis=-1)
        common = {"dtype": self.dtype, "kernels": self.kernels}
        h = GroupNorm(self.groups, self.eps, **common, name="norm1")(x_BHWC)
        h = Conv(self.channels, 3, 1, 1, **common, name="conv1")(nn.silu(h))
        if time_BC is not None:
            dense = nn.Dense(self.channels, dtype=self.dtype, name="time_emb_proj")
            h = h + dense(nn.silu(time_BC))[:, None, None, :]
        h = GroupNorm(self.groups, self.eps, **common, name="norm2")(h)
        h = Conv(self.channels, 3, 1, 1, **common, name="conv2")(nn.silu(h))
        if x_BHWC.shape[-1] != self.channels:
            x_BHWC = Conv(self.channels, 1, **common, name="conv_shortcut")(x_BHWC)
        return x_BHWC + h


class Attention(nn.Module):
    """Self-attention; or, with a context "B M D", attention to it.

    In the collection `text`, where there is one, are the keys and values of a context.
    """

    heads: int
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BNC, context_BMD=None):
        (B, N, C), source = x_BNC.shape, context_BMD
        if source is None:
            source = x_BNC

        def dense(name):
            return nn.Dense(C, use_bias=False, dtype=self.dtype, name=name)

        q = dense("to_q")(x_BNC)
        if self.has_variable("text", "key"):
            k, v = (self.get_variable("text", name) for name in ("key", "value"))
        else:
            k, v = dense("to_k")(source), dense("to_v")(source)
        q, k, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in (q, k, v))
        out = self.kernels.attend(q, k, v).reshape(B, N, C)
        return nn.Dense(C, dtype=self.dtype, name="to_out_0")(out)


class GEGLU(nn.Module):
    """A dense layer's first half times the GELU of its second, "B N 4C".

    Source: Shazeer 2020 (arXiv:2002.05202), eq. 6; GELU by erf, as in PyTorch.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BNC):
        width = 8 * x_BNC.shape[-1]
        h = nn.Dense(width, dtype=self.dtype, name="proj")(x_BNC)
        linear, gate = jnp.split(h, 2, axis=-1)
        return linear * gelu(gate)


class FeedForward(nn.Module):
    """A gated layer and a dense one, of each token by itself."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BNC):
        h = GEGLU(self.dtype, name="net_0")(x_BNC)
        return nn.Dense(x_BNC.shape[-1], dtype=self.dtype, name="net_2")(h)


def by_parts(module: nn.Module, x_BNC, *context):
    """Returns module(x, *context), "B N C", of one part of the tokens after the other.

    For layers that treat tokens alike. In memory is one part, also on the way back,
    where it is computed again.
    """
    N = x_BNC.shape[1]
    if N <= _PART or N % _PART:
        return module(x_BNC, *context)
    compute = nn.remat(lambda module, *args: module(*args))
    parts = jnp.split(x_BNC, N // _PART, axis=1)
    return jnp.concatenate([compute(module, part, *context) for part in parts], axis=1)


class TransformerBlock(nn.Module):
    """Self-attention, attention to text, feed-forward.

    With rematerialization the last two, whose hidden values are the largest of all,
    take the tokens `by_parts`.

    Attributes: only_cross_attention: the first attends to text too.
    """

    heads: int
    only_cross_attention: bool = False
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BNC, c_BLD):
        common = {"dtype": self.dtype, "kernels": self.kernels}

        def norm(name):
            return LayerNorm(1e-5, **common, name=name)

        def attention(name):
            return Attention(self.heads, **common, name=name)

        def apply(module, *args):
            in_parts = self.kernels.remat != "none" and not self.is_initializing()
            return by_parts(module, *args) if in_parts else module(*args)

        context = c_BLD if self.only_cross_attention else None
        x_BNC = x_BNC + attention("attn1")(norm("norm1")(x_BNC), context)
        x_BNC = x_BNC + apply(attention("attn2"), norm("norm2")(x_BNC), c_BLD)
        feed_forward = FeedForward(self.dtype, name="ff")
        return x_BNC + apply(feed_forward, norm("norm3")(x_BNC))


class Transformer2D(nn.Module):
    """Transformer blocks on the positions of an image, between two projections.

    Attributes: depth: number of blocks. linear: whether the projections are dense
      layers rather than 1x1 convolutions (other shapes of the same parameters).
      groups: of the norm.
    """

    heads: int
    depth: int = 1
    linear: bool = False
    only_cross_attention: bool = False
    groups: int = GROUPS
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BHWC, c_BLD):
        B, H, W, C = x_BHWC.shape
        common = {"dtype": self.dtype, "kernels": self.kernels}

        def project(name, x_BHWC):
            if self.linear:
                return nn.Dense(C, dtype=self.dtype, name=name)(x_BHWC)
            return Conv(C, 1, **common, name=name)(x_BHWC)

        h = GroupNorm(self.groups, 1e-6, **common, name="norm")(x_BHWC)
        h = project("proj_in", h).reshape(B, H * W, C)
        for i in range(self.depth):
            block = TransformerBlock(
                self.heads,
                self.only_cross_attention,
                **common,
                name=f"transformer_blocks_{i}",
            )
            h = block(h, c_BLD)
        return x_BHWC + project("proj_out", h.reshape(B, H, W, C))


class Upsample(nn.Module):
    """Twice the size, each value repeated, then a convolution."""

    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BHWC):
        B, H, W, C = x_BHWC.shape
        x = jnp.broadcast_to(x_BHWC[:, :, None, :, None, :], (B, H, 2, W, 2, C))
        conv = Conv(C, 3, 1, 1, dtype=self.dtype, kernels=self.kernels, name="conv")
        return conv(x.reshape(B, 2 * H, 2 * W, C))


class Downsample(nn.Module):
    """A convolution to half the size. Attributes: padding: see `Conv`."""

    padding: Any = 1
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BHWC):
        common = {"dtype": self.dtype, "kernels": self.kernels}
        conv = Conv(x_BHWC.shape[-1], 3, 2, self.padding, **common, name="conv")
        return conv(x_BHWC)
