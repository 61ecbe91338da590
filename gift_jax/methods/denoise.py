# SPDX-License-Identifier: Apache-2.0
"""The diffusion loss of a batch of cached pairs, shared by methods and attacks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from gift_jax import losses

# (parameters of the UNet, nested; z_t; t; c; kinds of layers) -> (output, hiddens)
Predict = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A UNet with its noise schedule.

    Attributes: predict: the UNet's forward pass. prediction_type: epsilon or
      v_prediction. train_timesteps: T.
    """

    predict: Predict
    prediction_type: str
    train_timesteps: int

    def losses(
        self,
        unet_params: Any,
        abar_T: jax.Array,
        batch: dict[str, jax.Array],
        key: jax.Array,
        capture: tuple[str, ...] = (),
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns (each example's diffusion loss, float32 "B"; captured hidden states).

        Args: unet_params: nested. abar_T: float32 "T". batch: mean, std: float32
          "B C H W", the scaled latents' posterior; text: float32 "B L D"; index, if it
          is a part of a batch: int32 "B". key: draws posterior, noise and timestep,
          each example by its place in the batch.
        Source: Ho et al. 2020, eq. 14, on latents (Rombach et al. 2022, eq. 2).
        """
        z, t, eps = self._drawn(batch, key)
        return self.losses_at(unet_params, abar_T, z, t, eps, batch["text"], capture)

    def distances(
        self,
        unet_params: Any,
        wanted_params: Any,
        abar_T: jax.Array,
        batch: dict[str, jax.Array],
        key: jax.Array,
    ) -> jax.Array:
        """Returns how far apart what two UNets predict is, float32 "B".

        Mean squares, at what `losses` draws with the same key; no gradient through the
        second UNet's prediction.
        """
        z, t, eps = self._drawn(batch, key)
        z_t, text = losses.add_noise(z, eps, abar_T[t]), batch["text"]
        out, _ = self.predict(unet_params, z_t, t, text, ())
        wanted, _ = self.predict(wanted_params, z_t, t, text, ())
        return losses.squared_error(out, jax.lax.stop_gradient(wanted))

    def _drawn(self, batch, key):
        """Returns (z, t, eps), each example's drawn by its place in the batch."""
        k_z, k_eps, k_t = jax.random.split(key, 3)
        mean, index_B = batch["mean"], batch.get("index")
        z = mean + batch["std"] * losses.normal_like(k_z, mean, index_B)
        eps = losses.normal_like(k_eps, z, index_B)
        t = losses.timesteps(k_t, z.shape[0], self.train_timesteps, index_B)
        return z, t, eps

    def losses_at(self, unet_params, abar_T, z, t, eps, text, capture=()):
        """The same for given latents, timesteps and noise."""
        abar = abar_T[t]
        z_t = losses.add_noise(z, eps, abar)
        out, hiddens = self.predict(unet_params, z_t, t, text, capture)
        wanted = losses.target(z, eps, abar, self.prediction_type)
        return losses.squared_error(out, wanted), hiddens
