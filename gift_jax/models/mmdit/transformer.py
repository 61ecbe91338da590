# SPDX-License-Identifier: Apache-2.0
"""The transformer (MMDiT) of Stable Diffusion 3 and 3.5.

Axes: B batch, C channels, H height, W width, L text tokens, D their width, P width of
the pooled text.
"""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from gift_jax.models.mmdit import layers
from gift_jax.models.ops.kernels import Kernels
from gift_jax.models.params import from_config

CAPTURE_KINDS = {  # kinds of hidden states: the layers whose outputs they are
    "transformer": layers.JointBlock,
    "attention": layers.JointAttention,
}


class Transformer(nn.Module):
    """The transformer; its fields but the last three are those of diffusers' config.

    Attributes: sample_size: latents along a side. pos_embed_max_size: patches along a
      side of the largest image. caption_projection_dim: heads times their size, too.
      dual_attention_layers: numbers of the blocks in which the image also attends to
      itself. qk_norm: "rms_norm" or None. repeats: the last token of the text counts
      as so many, all equal: they stay equal through all blocks. kernels: how its layers
      are computed.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None
    repeats: int = 1
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    capture_kinds = CAPTURE_KINDS

    def example_inputs(self):
        side = self.patch_size
        return (
            jnp.zeros((1, self.in_channels, side, side)),
            jnp.zeros((1,)),
            jnp.zeros((1, 2, self.joint_attention_dim)),
            jnp.zeros((1, self.pooled_projection_dim)),
        )

    @property
    def width(self) -> int:
        """C of the hidden states."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def max_side(self) -> int:
        """The most latents along a side that it takes."""
        return self.pos_embed_max_size * self.patch_size

    @nn.compact
    def __call__(self, z_BCHW, t_B, states_BLD, pooled_BP):
        """Returns the prediction, "B C H W" in the module's dtype.

        Args: z_BCHW: noised latents; H and W multiples of patch_size, at most
          `max_side`. t_B: timesteps, 0 to 1000. states_BLD, pooled_BP: of the text.
        Raises: ValueError for latents of another size.
        """

        def dense(width, name):
            return nn.Dense(width, dtype=self.dtype, name=name)

        common = {"dtype": self.dtype, "kernels": self.kernels}
        size, side = self.patch_size, self.pos_embed_max_size
        embed = layers.PatchEmbed(
            self.width, size, side, self.sample_size // size, **common, name="pos_embed"
        )
        x_BNC = embed(jnp.transpose(z_BCHW, (0, 2, 3, 1)))
        embed = layers.TimeTextEmbed(self.width, self.dtype, name="time_text_embed")
        time_BT = embed(t_B, pooled_BP)
        c_BLC = dense(self.caption_projection_dim, "context_embedder")(states_BLD)
        x_BNC = through_blocks(self, self.num_layers, x_BNC, c_BLC, time_BT)
        modulation = layers.Modulation(2, self.dtype, name="norm_out")
        scale, shift = modulation(time_BT)
        x_BNC = layers.modulate(layers.normalize(x_BNC, self.kernels), shift, scale)
        channels = self.out_channels or self.in_channels
        x_BNC = dense(size * size * channels, "proj_out")(x_BNC)
        return unpatchified(x_BNC, size, *z_BCHW.shape[2:])

    def block(self, i: int) -> layers.JointBlock:
        """Returns the block of number i."""
        cls = layers.JointBlock
        if self.kernels.remat != "none":
            cls = nn.remat(cls)
        return cls(
            self.num_attention_heads,
            self.qk_norm is not None,
            i in self.dual_attention_layers,
            i == self.num_layers - 1,
            self.repeats,
            dtype=self.dtype,
            kernels=self.kernels,
            name=f"transformer_blocks_{i}",
        )


def through_blocks(module, count: int, x_BNC, c_BLC, *others):
    """Returns the image's states after all blocks.

    The backward pass computes blocks again if it is to; groups of them, and then their
    blocks, if all is.

    Args: module: with `block`, a number -> the block. others: what each reads beside
      both streams.
    """

    def compute(module, group, x_BNC, c_BLC):
        for i in group:
            x_BNC, c_BLC = module.block(i)(x_BNC, c_BLC, *others)
        return x_BNC, c_BLC

    if module.kernels.remat != "full":
        return compute(module, range(count), x_BNC, c_BLC)[0]
    size = math.ceil(math.sqrt(count))
    for first in range(0, count, size):
        group = range(first, min(first + size, count))
        part = nn.remat(lambda module, x, c, group=group: compute(module, group, x, c))
        x_BNC, c_BLC = part(module, x_BNC, c_BLC)
    return x_BNC


def unpatchified(x_BNC, size: int, height: int, width: int):
    """Returns the image whose patches' values these are, "B C H W".

    Args: x_BNC: C holds size x size positions, each with all channels.
    """
    B, h, w = len(x_BNC), height // size, width // size
    x = x_BNC.reshape(B, h, w, size, size, -1)
    x = jnp.transpose(x, (0, 5, 1, 3, 2, 4))
    return x.reshape(B, -1, height, width)


def build_transformer(
    config: dict, dtype=jnp.float32, kernels: Kernels | None = None
) -> Transformer:
    """Returns the module of a diffusers `transformer/config.json` dict."""
    return from_config(Transformer, config, dtype=dtype, kernels=kernels or Kernels())


def apply_transformer(
    module: Any, params, z_BCHW, t_B, states_BLD, pooled_BP, capture=()
):
    """Returns (the transformer's output, captured hidden states). Pure and jittable.

    Args: module: a `Transformer`, or one that is called like it.
      params: nested. z_BCHW: "B C H W", noised latents. t_B: float "B", timesteps, 0
        to 1000. states_BLD: "B L D", text states. pooled_BP: "B P", pooled text.
      capture: of the module's `capture_kinds`, of the image's stream: "transformer"
        gives "B HW/patches C" after each block, "attention" of each attention.
    Returns: (output "B C H W" in the module's dtype, dict path -> array; the paths are
      those of the parameters, e.g. "transformer_blocks_0/attn").
    Raises: ValueError for an unknown kind, or latents of a size that it does not take.
    """
    classes = tuple(_capture_class(module.capture_kinds, kind) for kind in capture)
    out, state = module.apply(
        {"params": params},
        z_BCHW,
        jnp.asarray(t_B),
        states_BLD,
        pooled_BP,
        capture_intermediates=lambda layer, _: isinstance(layer, classes),
        mutable=["intermediates"],
    )
    hiddens: dict[tuple, Any] = dict(flatten_dict(state.get("intermediates", {})))
    # of each layer one call, of each call the image's states and the text's
    return out, {"/".join(path[:-1]): calls[0][0] for path, calls in hiddens.items()}


def _capture_class(kinds, kind):
    if kind not in kinds:
        choices = ", ".join(kinds)
        raise ValueError(f"capture={kind!r} must be one of {choices}")
    return kinds[kind]
