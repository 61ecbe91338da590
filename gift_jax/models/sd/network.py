# SPDX-License-Identifier: Apache-2.0
"""The UNet as what noise processes, attacks and samplers call."""

import dataclasses

import jax.numpy as jnp

from gift_jax.models import sd
from gift_jax.models.sd.unet import UNet


@dataclasses.dataclass(frozen=True)
class Network:
    """The UNet as a denoiser's forward pass; hashable, without parameters.

    Attributes: factor: pixels a latent, along a side.
    """

    unet: UNet
    factor: int

    def predict(self, params, z_t, t, cond, capture=()):
        """Returns (output, captured hidden states), see `diffusion.Denoiser`."""
        text = cond["states"].astype(self.unet.dtype)
        added = self._added(cond, z_t)
        z_t = z_t.astype(self.unet.dtype)
        return sd.apply_unet(self.unet, params, z_t, t, text, capture, added=added)

    def with_cond(self, params, cond):
        """Returns (z_t, t) -> output, for many calls on the same conditioning."""
        text = cond["states"].astype(self.unet.dtype)
        projected = sd.project_text(self.unet, params, text)  # once, not at every step

        def predict(z_t, t):
            added = self._added(cond, z_t)
            z_t = z_t.astype(self.unet.dtype)
            args = self.unet, params, z_t, t, text
            return sd.apply_unet(*args, text=projected, added=added)[0]

        return predict

    def _added(self, cond, z_t):
        """Returns what SDXL's UNet adds to the timestep; sizes: of a whole image.

        Source: diffusers `StableDiffusionXLPipeline._get_add_time_ids`.
        """
        if not self.unet.addition_embed_type:
            return None
        height, width = (side * self.factor for side in z_t.shape[2:])
        whole = jnp.asarray([height, width, 0, 0, height, width], jnp.float32)
        sizes = jnp.broadcast_to(whole, (z_t.shape[0], len(whole)))
        return cond["pooled"], cond.get("sizes", sizes)
