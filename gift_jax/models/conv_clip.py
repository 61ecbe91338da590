# SPDX-License-Identifier: Apache-2.0
"""A CLIP whose image tower is convolutional, for small pictures and little data.

The text tower is transformers' own, so its files load as any CLIP's. Learned from a few
thousand pictures, a vision transformer recognises nothing where convolutions do.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from transformers.models.clip.modeling_flax_clip import FlaxCLIPTextTransformer


class Pooled(NamedTuple):
    """What an image tower returns, under the name transformers gives it."""

    pooler_output: jax.Array


class ImageTower(nn.Module):
    """Residual stages, each at half the size, read out place by place.

    Attributes: channels: of the stem and of the stages. x_BHWC: float "B H W 3" ->
      pooler_output "B D", D = places x channels of the last stage.
    """

    channels: tuple[int, ...]
    groups: int = 8

    @nn.compact
    def __call__(self, x_BHWC):
        stem, *stages = self.channels
        x_BHWC = nn.silu(nn.Conv(stem, (5, 5), (2, 2), name="stem")(x_BHWC))
        for i, channels in enumerate(stages):
            x_BHWC = nn.Conv(channels, (3, 3), (2, 2), name=f"down_{i}")(x_BHWC)
            h_BHWC = x_BHWC
            for j in range(2):
                norm = nn.GroupNorm(self.groups, name=f"norm_{i}_{j}")
                conv = nn.Conv(channels, (3, 3), name=f"conv_{i}_{j}")
                h_BHWC = conv(nn.silu(norm(h_BHWC)))
            x_BHWC = x_BHWC + h_BHWC
        x_BHWC = nn.silu(nn.GroupNorm(self.groups, name="norm")(x_BHWC))
        return Pooled(x_BHWC.reshape(x_BHWC.shape[0], -1))


class ConvClip(nn.Module):
    """The two towers, with the submodules that FlaxCLIPModule has.

    Attributes: config: a CLIPConfig; `vision_config.conv_channels` sizes the tower.
    """

    config: object
    dtype: object = jnp.float32

    def setup(self):
        self.text_model = FlaxCLIPTextTransformer(
            self.config.text_config, dtype=self.dtype
        )
        self.vision_model = ImageTower(tuple(self.config.vision_config.conv_channels))
        width = self.config.projection_dim
        self.visual_projection = nn.Dense(width, use_bias=False, dtype=self.dtype)
        self.text_projection = nn.Dense(width, use_bias=False, dtype=self.dtype)
        start = nn.initializers.constant(self.config.logit_scale_init_value)
        self.logit_scale = self.param("logit_scale", start, ())

    def __call__(self, ids_BL, x_BHWC, mask_BL, positions_BL):
        """Returns the projected (image, text) embeddings, "B D" each."""
        image = self.vision_model(x_BHWC).pooler_output
        text = self.text_model(ids_BL, mask_BL, positions_BL).pooler_output
        return self.visual_projection(image), self.text_projection(text)
