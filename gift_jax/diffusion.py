# SPDX-License-Identifier: Apache-2.0
"""The denoising loss and the noise it draws, as pure functions of arrays.

Axes: B batch, C latent channels, H W latent size, L tokens, D text width, T train
timesteps. Sources: DDPM is Ho et al. 2020 (arXiv:2006.11239); v-prediction is
Salimans & Ho 2022 (arXiv:2202.00512).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

PREDICTION_TYPES = ("epsilon", "v_prediction")


# --- noise, drawn per example ---------------------------------------------------------


def example_keys(key: jax.Array, index_B: jax.Array) -> jax.Array:
    """Returns one key an example, folded with its index in the global batch.

    What is drawn from them does not depend on how a batch is divided over devices.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index_B)


def normal_like(
    key: jax.Array, x: jax.Array, index_B: jax.Array | None = None
) -> jax.Array:
    """Returns N(0, 1) noise of x's shape and dtype, drawn per example (axis 0).

    Args: index_B: the examples' places in the global batch; by default x is all of it.
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


# --- noise processes ------------------------------------------------------------------


class NoiseProcess(Protocol):
    """How latents are noised in training, and what the denoiser is to predict."""

    @property
    def num_timesteps(self) -> int:
        """Timesteps of training; samplers take some of them."""
        ...

    def sample_t(self, key: jax.Array, batch: int, index_B=None) -> jax.Array:
        """Returns each example's timestep, "B"."""
        ...

    def noised(self, z_BCHW, eps_BCHW, t_B) -> jax.Array:
        """Returns the noised latents z_t, "B C H W"."""
        ...

    def target(self, z_BCHW, eps_BCHW, t_B) -> jax.Array:
        """Returns what the denoiser is to predict at z_t, "B C H W"."""
        ...

    def noise_of(self, out_BCHW, z_t_BCHW, t_B) -> jax.Array:
        """Returns the eps, "B C H W", that an output at z_t stands for."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Ddpm:
    """The variance-preserving process of DDPM, uniform over T discrete timesteps.

    Attributes: abar_T: float "T", the cumulative alphas, in (0, 1], descending.
      prediction_type: of PREDICTION_TYPES.
    Raises: ValueError for another prediction type.
    """

    abar_T: np.ndarray
    prediction_type: str = "epsilon"

    def __post_init__(self):
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type={self.prediction_type!r} must be one of "
                f"{', '.join(PREDICTION_TYPES)}"
            )

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.abar_T)

    def abar(self, t_B: jax.Array) -> jax.Array:
        """Returns the cumulative alpha at each timestep, "B"."""
        return jnp.asarray(self.abar_T)[t_B]

    def sample_t(self, key, batch, index_B=None):
        """Returns int32 "B", uniform over 0 .. T - 1."""
        return timesteps(key, batch, self.num_timesteps, index_B)

    def noised(self, z_BCHW, eps_BCHW, t_B):
        """Returns sqrt(abar) z + sqrt(1 - abar) eps. Source: Ho et al. 2020, eq. 4."""
        return add_noise(z_BCHW, eps_BCHW, self.abar(t_B))

    def target(self, z_BCHW, eps_BCHW, t_B):
        """Returns eps, or v = sqrt(abar) eps - sqrt(1 - abar) z.

        Source: Ho et al. 2020, eq. 14; Salimans & Ho 2022, section 4.
        """
        if self.prediction_type == "epsilon":
            return eps_BCHW
        abar = per_example(self.abar(t_B), z_BCHW)
        return jnp.sqrt(abar) * eps_BCHW - jnp.sqrt(1.0 - abar) * z_BCHW

    def noise_of(self, out_BCHW, z_t_BCHW, t_B):
        """Returns the output, or of a v: sqrt(abar) v + sqrt(1 - abar) z_t.

        Source: Salimans & Ho 2022, section 4.
        """
        if self.prediction_type == "epsilon":
            return out_BCHW
        abar = per_example(self.abar(t_B), out_BCHW)
        return jnp.sqrt(abar) * out_BCHW + jnp.sqrt(1.0 - abar) * z_t_BCHW


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


# --- the loss -------------------------------------------------------------------------


def at_least_float32(x: jax.Array) -> jax.Array:
    """Returns x in float32, or as it is if it is wider."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def squared_error(prediction, target):
    """Returns the mean square error of each example, float32 "B"."""
    error = jnp.square(at_least_float32(prediction) - at_least_float32(target))
    return jnp.mean(error, axis=tuple(range(1, error.ndim)))


# (nested parameters; z_t; t; cond; kinds of layers to capture) -> (output, hiddens)
Predict = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A denoising network with its noise process.

    Attributes: predict: the network's forward pass. noise: the process it is trained
      on.
    """

    predict: Predict
    noise: NoiseProcess

    def losses(
        self,
        params: Any,
        batch: dict[str, Any],
        key: jax.Array,
        capture: tuple[str, ...] = (),
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns (each example's denoising loss, float32 "B"; captured hidden states).

        Args: params: nested. batch: mean, std: float32 "B C H W", the scaled latents'
          posterior; cond: a pytree "B ...", the conditioning; index, if it is a part
          of a batch: int32 "B". key: draws posterior, noise and timestep, each example
          by its place in the batch.
        Source: Ho et al. 2020, eq. 14, on latents (Rombach et al. 2022, eq. 2).
        """
        z, t, eps = self.sample(batch, key)
        return self.losses_at(params, z, t, eps, batch["cond"], capture)

    def distances(
        self, params: Any, reference: Any, batch: dict[str, Any], key: jax.Array
    ) -> jax.Array:
        """Returns how far apart the predictions of two networks are, float32 "B".

        Mean squares, at what `losses` draws with the same key; no gradient through the
        prediction of the parameters `reference`.
        """
        z, t, eps = self.sample(batch, key)
        z_t, cond = self.noise.noised(z, eps, t), batch["cond"]
        out, _ = self.predict(params, z_t, t, cond, ())
        expected, _ = self.predict(reference, z_t, t, cond, ())
        return squared_error(out, jax.lax.stop_gradient(expected))

    def sample(self, batch, key):
        """Returns (z, t, eps), each example's drawn by its place in the batch."""
        k_z, k_eps, k_t = jax.random.split(key, 3)
        mean, index_B = batch["mean"], batch.get("index")
        z = mean + batch["std"] * normal_like(k_z, mean, index_B)
        eps = normal_like(k_eps, z, index_B)
        return z, self.noise.sample_t(k_t, z.shape[0], index_B), eps

    def losses_at(self, params, z, t, eps, cond, capture=()):
        """As `losses`, for given latents, timesteps and noise."""
        z_t = self.noise.noised(z, eps, t)
        out, hiddens = self.predict(params, z_t, t, cond, capture)
        return squared_error(out, self.noise.target(z, eps, t)), hiddens
