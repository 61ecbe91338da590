# SPDX-License-Identifier: Apache-2.0
"""The denoising loss and the noise it draws, as pure functions of arrays.

Axes: B batch, C latent channels, H W latent size, L tokens, D text width, T train
timesteps, S rows of a sampler's table. Sources: DDPM is Ho et al. 2020
(arXiv:2006.11239); v-prediction is Salimans & Ho 2022 (arXiv:2202.00512); flow matching
is Esser et al. 2024 (arXiv:2403.03206).
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

    def sample_t(
        self, key: jax.Array, batch: int, index_B=None, limit: float = 1.0
    ) -> jax.Array:
        """Returns each example's timestep, "B"; larger ones are noisier.

        Args: limit: up to this share of the timesteps, from the cleanest.
        """
        ...

    def sample_t_of_rows(self, key: jax.Array, row_B, t_S) -> jax.Array:
        """Returns a timestep of each example's row of a sampler's table, "B".

        Drawn between the row's own and the next noisier one. Args: row_B: int. t_S: the
        table's timesteps, descending.
        """
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

    def sample_t(self, key, batch, index_B=None, limit=1.0):
        """Returns int32 "B", uniform over 0 .. T - 1, times the limit."""
        t = timesteps(key, batch, self.num_timesteps, index_B)
        return t if limit == 1 else (t * limit).astype(t.dtype)

    def sample_t_of_rows(self, key, row_B, t_S):
        """Returns int32 "B": of T i / S .. T (i + 1) / S - 1, where i = S - 1 - row.

        Source: Gandikota et al. 2023 (arXiv:2303.07345), the code it comes with.
        """
        steps = len(t_S)
        bounds = np.arange(steps + 1) * self.num_timesteps // steps
        low, high = jnp.asarray(bounds[:-1][::-1]), jnp.asarray(bounds[1:][::-1])
        keys = example_keys(key, jnp.arange(row_B.shape[0]))
        draw = jax.vmap(lambda k, a, b: jax.random.randint(k, (), a, b))
        return draw(keys, low[row_B], high[row_B]).astype(jnp.int32)

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


@dataclasses.dataclass(frozen=True, eq=False)
class FlowMatching:
    """Rectified flow: z_t lies on the straight line from the latents to the noise.

    Its place there is sigma, and t is T sigma, a real number up to T. Which place is
    drawn: u, the sigmoid of a normal variable, says how far along sigma_T, from its
    noisy end.

    Attributes: sigma_T: float "T", the levels of training, in (0, 1], descending, as a
      scheduler shifts them. logit_mean, logit_std: of the normal variable.
    Source: Esser et al. 2024, sections 2 and 3.1; diffusers
      examples/dreambooth/train_dreambooth_lora_sd3.py, outputs not preconditioned.
    """

    sigma_T: np.ndarray
    logit_mean: float = 0.0
    logit_std: float = 1.0

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.sigma_T)

    def sigma(self, t_B: jax.Array) -> jax.Array:
        """Returns the share of noise at each timestep, "B"."""
        return at_least_float32(t_B) / self.num_timesteps

    def sample_t(self, key, batch, index_B=None, limit=1.0):
        """Returns T sigma_T[floor(T u)], float "B", times the limit.

        Source: diffusers `compute_density_for_timestep_sampling`, "logit_normal".
        """
        keys = example_keys(key, _places(batch, index_B))
        normal_B = jax.vmap(lambda k: jax.random.normal(k, ()))(keys)
        u_B = jax.nn.sigmoid(self.logit_mean + self.logit_std * normal_B)
        T = self.num_timesteps
        place_B = jnp.minimum((u_B * T).astype(jnp.int32), T - 1)
        return T * jnp.asarray(self.sigma_T)[place_B] * limit

    def sample_t_of_rows(self, key, row_B, t_S):
        """Returns float "B", between the row's own and that of the row before, or T.

        The counterpart of what ESD's code does with the timesteps of DDPM.
        """
        own_S = jnp.asarray(t_S)
        before_S = jnp.concatenate([jnp.full((1,), self.num_timesteps), own_S[:-1]])
        keys = example_keys(key, jnp.arange(row_B.shape[0]))
        draw = jax.vmap(lambda k, a, b: jax.random.uniform(k, (), minval=a, maxval=b))
        return draw(keys, own_S[row_B], before_S[row_B])

    def noised(self, z_BCHW, eps_BCHW, t_B):
        """Returns (1 - sigma) z + sigma eps. Source: Esser et al. 2024, section 3.

        Raises: ValueError if z and eps differ in shape.
        """
        _check_same_shape(z_BCHW, eps_BCHW)
        sigma = per_example(self.sigma(t_B), z_BCHW)
        return (1.0 - sigma) * z_BCHW + sigma * eps_BCHW

    def target(self, z_BCHW, eps_BCHW, t_B):
        """Returns the velocity along the line, d z_t / d sigma = eps - z."""
        return eps_BCHW - z_BCHW

    def noise_of(self, out_BCHW, z_t_BCHW, t_B):
        """Returns z_t + (1 - sigma) out, which is eps if out is eps - z."""
        sigma = per_example(self.sigma(t_B), out_BCHW)
        return z_t_BCHW + (1.0 - sigma) * out_BCHW


def add_noise(z_BCHW: jax.Array, eps_BCHW: jax.Array, abar_B: jax.Array) -> jax.Array:
    """Returns z_t = sqrt(abar) z + sqrt(1 - abar) eps, "B C H W".

    Args: z_BCHW: scaled latents. eps_BCHW: N(0, 1). abar_B: cumulative alpha at each
      example's timestep, in (0, 1].
    Raises: ValueError if z and eps differ in shape.
    Source: Ho et al. 2020, eq. 4.
    """
    _check_same_shape(z_BCHW, eps_BCHW)
    abar = per_example(abar_B, z_BCHW)
    return jnp.sqrt(abar) * z_BCHW + jnp.sqrt(1.0 - abar) * eps_BCHW


def _check_same_shape(z_BCHW, eps_BCHW):
    if z_BCHW.shape != eps_BCHW.shape:
        raise ValueError(f"latents {z_BCHW.shape} and noise {eps_BCHW.shape} differ")


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

    def sample(self, batch, key, limit: float = 1.0):
        """Returns (z, t, eps), each example's drawn by its place in the batch.

        Args: limit: see `NoiseProcess.sample_t`.
        """
        k_z, k_eps, k_t = jax.random.split(key, 3)
        mean, index_B = batch["mean"], batch.get("index")
        z = mean + batch["std"] * normal_like(k_z, mean, index_B)
        eps = normal_like(k_eps, z, index_B)
        return z, self.noise.sample_t(k_t, z.shape[0], index_B, limit), eps

    def losses_at(self, params, z, t, eps, cond, capture=()):
        """As `losses`, for given latents, timesteps and noise."""
        z_t = self.noise.noised(z, eps, t)
        out, hiddens = self.predict(params, z_t, t, cond, capture)
        return squared_error(out, self.noise.target(z, eps, t)), hiddens
