# SPDX-License-Identifier: Apache-2.0
"""Between images and the latents that a denoiser works on, as pure functions.

Axes: B batch, H W image, C channels and h w size of latents.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class LatentScale(NamedTuple):
    """Scaled latents are (z - shift) * factor of the VAE's z; float32 scalars.

    shift: None where there is none, and nothing is subtracted.
    Source: diffusers `StableDiffusionPipeline`, `StableDiffusion3Pipeline`.
    """

    factor: Any
    shift: Any = None

    def scaled(self, z_BCHW: Any) -> Any:
        """Returns the denoiser's latents, of the VAE's."""
        z_BCHW = z_BCHW if self.shift is None else z_BCHW - self.shift
        return z_BCHW * self.factor

    def unscaled(self, z_BCHW: Any) -> Any:
        """Returns the VAE's latents, of the denoiser's."""
        z_BCHW = z_BCHW / self.factor
        return z_BCHW if self.shift is None else z_BCHW + self.shift


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """A VAE's forward passes; hashable, without parameters.

    Attributes: vae: a module with `encode` and `decode`, see `models.sd.vae.VAE`.
    """

    vae: Any

    def encode(self, params: Any, x_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (mean, std) of the posterior, float32 "B C h w", not scaled.

        Args: x_BHWC: in [-1, 1].
        """
        x_BCHW = jnp.transpose(x_BHWC, (0, 3, 1, 2)).astype(self.vae.dtype)
        mean, logvar = self._apply(params, x_BCHW, self.vae.encode)
        return mean.astype(jnp.float32), jnp.exp(0.5 * logvar.astype(jnp.float32))

    def decode(self, params: Any, z_BCHW: jax.Array) -> jax.Array:
        """Returns float32 "B H W 3", about [-1, 1], of latents that are not scaled."""
        x_BCHW = self._apply(params, z_BCHW.astype(self.vae.dtype), self.vae.decode)
        return jnp.transpose(x_BCHW, (0, 2, 3, 1)).astype(jnp.float32)

    def decode_scaled(
        self, params: Any, scale: LatentScale, z_BCHW: jax.Array
    ) -> jax.Array:
        """Returns the same of scaled latents; the scale is an argument of programs."""
        return self.decode(params, scale.unscaled(z_BCHW))

    def _apply(self, params, x, method):
        return self.vae.apply({"params": params}, x, method=method)
