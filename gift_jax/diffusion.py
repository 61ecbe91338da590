# SPDX-License-Identifier: Apache-2.0
"""The diffusion loss and the noise it draws, as pure functions of arrays.

Axes: B batch, C latent channels, H W latent size, L tokens, D text width, T train
timesteps. Sources: DDPM is Ho et al. 2020 (arXiv:2006.11239); v-prediction is
Salimans & Ho 2022 (arXiv:2202.00512)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

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
        z_t, text = add_noise(z, eps, abar_T[t]), batch["text"]
        out, _ = self.predict(unet_params, z_t, t, text, ())
        wanted, _ = self.predict(wanted_params, z_t, t, text, ())
        return squared_error(out, jax.lax.stop_gradient(wanted))

    def _drawn(self, batch, key):
        """Returns (z, t, eps), each example's drawn by its place in the batch."""
        k_z, k_eps, k_t = jax.random.split(key, 3)
        mean, index_B = batch["mean"], batch.get("index")
        z = mean + batch["std"] * normal_like(k_z, mean, index_B)
        eps = normal_like(k_eps, z, index_B)
        t = timesteps(k_t, z.shape[0], self.train_timesteps, index_B)
        return z, t, eps

    def losses_at(self, unet_params, abar_T, z, t, eps, text, capture=()):
        """The same for given latents, timesteps and noise."""
        abar = abar_T[t]
        z_t = add_noise(z, eps, abar)
        out, hiddens = self.predict(unet_params, z_t, t, text, capture)
        wanted = prediction_target(z, eps, abar, self.prediction_type)
        return squared_error(out, wanted), hiddens


def example_keys(key: jax.Array, index_B: jax.Array) -> jax.Array:
    """Returns one key an example, folded with its index in the global batch.

    What is drawn from them does not depend on how a batch is divided over devices.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index_B)


def normal_like(
    key: jax.Array, x: jax.Array, index_B: jax.Array | None = None
) -> jax.Array:
    """Returns N(0, 1) noise of x's shape and dtype, drawn per example (axis 0).

    Args: index_B: the examples' places in the whole batch; by default x is all of it.
    """
    keys = example_keys(key, _places(x.shape[0], index_B))
    return jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)


def timesteps(
    key: jax.Array, batch: int, limit: int, index_B: jax.Array | None = None
) -> jax.Array:
    """Returns int32 "B", uniform over 0 .. limit - 1, drawn per example.

    Args: index_B: see `normal_like`.
    """
    keys = example_keys(key, _places(batch, index_B))
    return jax.vmap(lambda k: jax.random.randint(k, (), 0, limit))(keys)


def _places(batch: int, index_B: jax.Array | None) -> jax.Array:
    return jnp.arange(batch) if index_B is None else index_B


def per_example(values_B: jax.Array, like: jax.Array) -> jax.Array:
    """Reshapes "B" to broadcast against `like`, whose first axis is B."""
    return values_B.reshape(values_B.shape + (1,) * (like.ndim - 1))


def add_noise(z_BCHW: jax.Array, eps_BCHW: jax.Array, abar_B: jax.Array) -> jax.Array:
    """Returns z_t = sqrt(abar) z + sqrt(1 - abar) eps, "B C H W".

    Args: z_BCHW: scaled latents. eps_BCHW: N(0, 1). abar_B: cumulative alpha at each
      example's timestep, in (0, 1].
    Raises: ValueError if z and eps differ in shape.
    Source: Ho et al. 2020, eq. 4.
    """
    if z_BCHW.shape != eps_BCHW.shape:
        raise ValueError(f"latents {z_BCHW.shape} and noise {eps_BCHW.shape} differ")
    abar = per_example(abar_B, z_BCHW)
    return jnp.sqrt(abar) * z_BCHW + jnp.sqrt(1.0 - abar) * eps_BCHW


def prediction_target(z_BCHW, eps_BCHW, abar_B, prediction_type: str):
    """Returns what the UNet is to predict: eps, or v = sqrt(abar) eps - sqrt(1-abar) z.

    Raises: ValueError for a prediction type other than epsilon or v_prediction.
    Source: Ho et al. 2020, eq. 14; Salimans & Ho 2022, section 4.
    """
    if prediction_type == "epsilon":
        return eps_BCHW
    if prediction_type == "v_prediction":
        abar = per_example(abar_B, z_BCHW)
        return jnp.sqrt(abar) * eps_BCHW - jnp.sqrt(1.0 - abar) * z_BCHW
    raise ValueError(
        f"prediction_type={prediction_type!r} is not epsilon or v_prediction"
    )


def at_least_float32(x: jax.Array) -> jax.Array:
    """Returns x in float32, or as it is if it is wider."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def squared_error(prediction, wanted):
    """Returns the mean square error of each example, float32 "B"."""
    error = jnp.square(at_least_float32(prediction) - at_least_float32(wanted))
    return jnp.mean(error, axis=tuple(range(1, error.ndim)))
