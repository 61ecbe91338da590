# SPDX-License-Identifier: Apache-2.0
"""The autoencoder (AutoencoderKL) of Stable Diffusion, of every version.

Axes: B batch, C channels, H height, W width, h w of latents.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from gift_jax.models.ops.attention import attention_reference
from gift_jax.models.ops.kernels import Kernels
from gift_jax.models.ops.layers import Conv, GroupNorm
from gift_jax.models.params import from_config
from gift_jax.models.sd.layers import GROUPS, Downsample, ResnetBlock, Upsample

_EPS = 1e-6


class AttentionBlock(nn.Module):
    """Self-attention of an image's positions, with a single head."""

    groups: int
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BHWC):
        B, H, W, C = x_BHWC.shape
        norm = GroupNorm(self.groups, _EPS, self.dtype, self.kernels, name="group_norm")
        h = norm(x_BHWC).reshape(B, H * W, C)

        def dense(name):
            return nn.Dense(C, dtype=self.dtype, name=name)

        names = ("query", "key", "value")
        q, k, v = (dense(name)(h)[:, :, None, :] for name in names)
        out = attention_reference(q, k, v).reshape(B, H * W, C)
        return x_BHWC + dense("proj_attn")(out).reshape(B, H, W, C)


class Stage(nn.Module):
    """Resnets at one size, and a change of size, "down" or "up", or none, ""."""

    channels: int
    num_layers: int
    resize: str
    groups: int
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BHWC):
        common = {"dtype": self.dtype, "kernels": self.kernels}
        for i in range(self.num_layers):
            fields = self.channels, _EPS, self.groups
            x_BHWC = ResnetBlock(*fields, **common, name=f"resnets_{i}")(x_BHWC)
        if self.resize == "down":
            padding = ((0, 1), (0, 1))
            x_BHWC = Downsample(padding, **common, name="downsamplers_0")(x_BHWC)
        if self.resize == "up":
            x_BHWC = Upsample(**common, name="upsamplers_0")(x_BHWC)
        return x_BHWC


class MidStage(nn.Module):
    """A resnet, attention if there is any, a resnet."""

    groups: int
    attention: bool = True
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BHWC):
        common = {"dtype": self.dtype, "kernels": self.kernels}
        fields = x_BHWC.shape[-1], _EPS, self.groups
        x_BHWC = ResnetBlock(*fields, **common, name="resnets_0")(x_BHWC)
        if self.attention:
            x_BHWC = AttentionBlock(self.groups, **common, name="attentions_0")(x_BHWC)
        return ResnetBlock(*fields, **common, name="resnets_1")(x_BHWC)


class Coder(nn.Module):
    """The encoder, or the decoder.

    Attributes: channels: of the stages, in their order. decode: whether it is the
      decoder. out_channels: of the result. attention: whether there is any.
    """

    channels: tuple[int, ...]
    num_layers: int
    out_channels: int
    decode: bool
    groups: int = GROUPS
    attention: bool = True
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BHWC):
        common = {"dtype": self.dtype, "kernels": self.kernels}
        mid = MidStage(self.groups, self.attention, **common, name="mid_block")
        x_BHWC = Conv(self.channels[0], 3, 1, 1, **common, name="conv_in")(x_BHWC)
        if self.decode:
            x_BHWC = mid(x_BHWC)
        for i, channels in enumerate(self.channels):
            resize = "up" if self.decode else "down"
            if i == len(self.channels) - 1:
                resize = ""
            fields = channels, self.num_layers, resize, self.groups
            name = f"up_blocks_{i}" if self.decode else f"down_blocks_{i}"
            x_BHWC = Stage(*fields, **common, name=name)(x_BHWC)
        if not self.decode:
            x_BHWC = mid(x_BHWC)
        norm = GroupNorm(self.groups, _EPS, **common, name="conv_norm_out")
        conv = Conv(self.out_channels, 3, 1, 1, **common, name="conv_out")
        return conv(nn.silu(norm(x_BHWC)))


class VAE(nn.Module):
    """The autoencoder; its fields but the last two are diffusers' config.json's.

    Attributes: scaling_factor, shift_factor: what a denoiser sees of latents z is
      (z - shift_factor) scaling_factor. use_quant_conv, use_post_quant_conv: without
      them the latents are the coders' own, as in Stable Diffusion 3.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = GROUPS
    sample_size: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    def setup(self):
        common = {"dtype": self.dtype, "kernels": self.kernels}
        moments, groups = 2 * self.latent_channels, self.norm_num_groups
        channels, count = tuple(self.block_out_channels), self.layers_per_block
        same = groups, self.mid_block_add_attention
        self.encoder = Coder(channels, count, moments, False, *same, **common)
        fields = channels[::-1], count + 1, self.out_channels
        self.decoder = Coder(*fields, True, *same, **common)
        if self.use_quant_conv:
            self.quant_conv = Conv(moments, 1, **common)
        if self.use_post_quant_conv:
            self.post_quant_conv = Conv(self.latent_channels, 1, **common)

    def encode(self, x_BCHW):
        """Returns (mean, logvar) of the posterior, "B C h w" each, not scaled."""
        moments = self.encoder(jnp.transpose(x_BCHW, (0, 2, 3, 1)))
        moments = self.quant_conv(moments) if self.use_quant_conv else moments
        mean, logvar = jnp.split(jnp.transpose(moments, (0, 3, 1, 2)), 2, axis=1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z_BCHW):
        """Returns images "B 3 H W", about [-1, 1], of unscaled latents."""
        z_BHWC = jnp.transpose(z_BCHW, (0, 2, 3, 1))
        z_BHWC = self.post_quant_conv(z_BHWC) if self.use_post_quant_conv else z_BHWC
        return jnp.transpose(self.decoder(z_BHWC), (0, 3, 1, 2))

    def __call__(self, x_BCHW):
        return self.decode(self.encode(x_BCHW)[0])

    def example_inputs(self):
        size = 2 ** len(self.block_out_channels)
        return (jnp.zeros((1, self.in_channels, size, size)),)


def build_vae(config: dict, dtype=jnp.float32, kernels: Kernels | None = None) -> VAE:
    """Returns the module of a diffusers `vae/config.json` dict."""
    config = config | {"shift_factor": config.get("shift_factor") or 0.0}
    return from_config(VAE, config, dtype=dtype, kernels=kernels or Kernels())


def apply_vae_encode(vae: VAE, params, x_BCHW):
    """Returns (mean, logvar) of the posterior, "B C h w" each, not yet scaled.

    Args: x_BCHW: "B 3 H W" in [-1, 1]. Scaling: see `models.autoencoder`.
    """
    return vae.apply({"params": params}, x_BCHW, method=vae.encode)


def apply_vae_decode(vae: VAE, params, z_BCHW):
    """Returns images "B 3 H W", about [-1, 1], of latents already unscaled."""
    return vae.apply({"params": params}, z_BCHW, method=vae.decode)
