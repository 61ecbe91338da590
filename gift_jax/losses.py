# SPDX-License-Identifier: Apache-2.0
"""The objectives, as pure functions of arrays.

Axes: B batch, C latent channels, H W latent size, L tokens, D text width, T train
timesteps. Sources: DDPM is Ho et al. 2020 (arXiv:2006.11239); v-prediction is
Salimans & Ho 2022 (arXiv:2202.00512); GIFT is arXiv:2507.13598.
"""

import jax
import jax.numpy as jnp


def example_keys(key: jax.Array, index_B: jax.Array) -> jax.Array:
    """Returns one key an example, folded with its index in the global batch.

    What is drawn from them does not depend on how a batch is divided over devices.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index_B)


def normal_like(key: jax.Array, x: jax.Array) -> jax.Array:
    """Returns N(0, 1) noise of x's shape and dtype, drawn per example (axis 0)."""
    keys = example_keys(key, jnp.arange(x.shape[0]))
    return jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)


def timesteps(key: jax.Array, batch: int, limit: int) -> jax.Array:
    """Returns int32 "B", uniform over 0 .. limit - 1, drawn per example."""
    keys = example_keys(key, jnp.arange(batch))
    return jax.vmap(lambda k: jax.random.randint(k, (), 0, limit))(keys)


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


def target(z_BCHW, eps_BCHW, abar_B, prediction_type: str):
    """Returns what the UNet is to predict: eps, or v = sqrt(abar) eps - sqrt(1-abar) z.

    Raises: ValueError for a prediction type other than epsilon or v_prediction.
    Source: Ho et al. 2020, eq. 14; Salimans & Ho 2022, section 4.
    """
    if prediction_type == "epsilon":
        return eps_BCHW
    if prediction_type == "v_prediction":
        abar = per_example(abar_B, z_BCHW)
        return jnp.sqrt(abar) * eps_BCHW - jnp.sqrt(1.0 - abar) * z_BCHW
    raise ValueError(f"prediction_type={prediction_type!r} is not epsilon or v_prediction")


def squared_error(prediction, wanted):
    """Returns the mean square error of each example, float32 "B"."""
    error = jnp.square(prediction.astype(jnp.float32) - wanted.astype(jnp.float32))
    return jnp.mean(error, axis=tuple(range(1, error.ndim)))
