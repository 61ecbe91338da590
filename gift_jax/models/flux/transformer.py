# SPDX-License-Identifier: Apache-2.0
"""The transformer of FLUX.1: joint blocks, and then blocks of one stream.

Its latents are those of the autoencoder, "B C H W": 2x2 of them are packed into a token
within. Axes: B batch, C channels, N tokens of an image, L of the text.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from gift_jax.models.mmdit import layers
from gift_jax.models.mmdit.transformer import through_blocks
from gift_jax.models.ops.kernels import Kernels
from gift_jax.models.params import from_config

PACK = 2  # latents of a token, along a side
GUIDANCE = 3.5  # diffusers', of its pipeline and of its training script
CAPTURE_KINDS = {  # kinds of hidden states: the layers whose outputs they are
    "transformer": (layers.JointBlock, layers.SingleBlock),
    "attention": layers.JointAttention,
}


class Transformer(nn.Module):
    """The transformer; its fields but the last two are those of diffusers' config.

    A model distilled from its guided self (`guidance_embeds`, FLUX.1-dev) reads a scale
    as it reads the timestep: here always `GUIDANCE`. What samplers call guidance is
    classifier-free guidance on top of that, `true_cfg_scale` of diffusers' pipeline.

    Attributes: in_channels: of a token, four times the latents'. axes_dims_rope: how
      many of a head's features are rotated by a token's index, row and column; the
      index is always 0, and text has no places. kernels: how its layers are computed.
    """

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    capture_kinds = CAPTURE_KINDS

    def example_inputs(self):
        return (
            jnp.zeros((1, self.in_channels // PACK**2, PACK, PACK)),
            jnp.zeros((1,)),
            jnp.zeros((1, 2, self.joint_attention_dim)),
            jnp.zeros((1, self.pooled_projection_dim)),
        )

    @nn.compact
    def __call__(self, z_BCHW, t_B, states_BLD, pooled_BP):
        """Returns the prediction, "B C H W" in the module's dtype.

        Image before text, in PyTorch the other way round; attention sees no order.

        Args: z_BCHW: noised latents; H and W even. t_B: timesteps, 0 to 1000.
          states_BLD, pooled_BP: of the text.
        Raises: ValueError for latents of another size.
        Source: diffusers `FluxTransformer2DModel`.
        """
        _, _, H, W = z_BCHW.shape
        if H % PACK or W % PACK:
            raise ValueError(f"latents of {H}x{W}; both must be multiples of {PACK}")
        width = self.num_attention_heads * self.attention_head_dim

        def dense(width, name):
            return nn.Dense(width, dtype=self.dtype, name=name)

        x_BNC = dense(width, "x_embedder")(packed(z_BCHW))
        guidance = 1000 * GUIDANCE if self.guidance_embeds else None
        fields = width, self.dtype, guidance
        time_BT = layers.TimeTextEmbed(*fields, name="time_text_embed")(t_B, pooled_BP)
        c_BLC = dense(width, "context_embedder")(states_BLD)
        places = H // PACK, W // PACK, c_BLC.shape[1]
        rotary = layers.rotations(*places, self.axes_dims_rope)
        count = self.num_layers + self.num_single_layers
        x_BNC = through_blocks(self, count, x_BNC, c_BLC, time_BT, rotary)
        scale, shift = layers.Modulation(2, self.dtype, name="norm_out")(time_BT)
        x_BNC = layers.modulate(layers.normalize(x_BNC, self.kernels), shift, scale)
        return unpacked(dense(self.in_channels, "proj_out")(x_BNC), H, W)

    def block(self, i: int) -> nn.Module:
        """Returns the block of number i: the joint ones are first."""
        heads, common = self.num_attention_heads, (self.dtype, self.kernels)
        again = nn.remat if self.kernels.remat != "none" else lambda cls: cls
        if i < self.num_layers:
            fields = heads, True, False, False, 1, *common
            return again(layers.JointBlock)(*fields, name=f"transformer_blocks_{i}")
        name = f"single_transformer_blocks_{i - self.num_layers}"
        return again(layers.SingleBlock)(heads, *common, name=name)


def packed(z_BCHW):
    """Returns 2x2 latents of all channels as a token, "B N C"; diffusers' order."""
    B, C, H, W = z_BCHW.shape
    x = z_BCHW.reshape(B, C, H // PACK, PACK, W // PACK, PACK)
    x = jnp.transpose(x, (0, 2, 4, 1, 3, 5))
    return x.reshape(B, -1, C * PACK**2)


def unpacked(x_BNC, height: int, width: int):
    """Returns the latents that `packed` made tokens of, "B C H W"."""
    B = len(x_BNC)
    x = x_BNC.reshape(B, height // PACK, width // PACK, -1, PACK, PACK)
    x = jnp.transpose(x, (0, 3, 1, 4, 2, 5))
    return x.reshape(B, -1, height, width)


def build_transformer(config: dict, dtype=jnp.float32) -> Transformer:
    """Returns the module of a diffusers `transformer/config.json` dict."""
    return from_config(Transformer, config, dtype=dtype)
