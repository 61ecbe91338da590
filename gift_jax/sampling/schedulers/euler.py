# SPDX-License-Identifier: Apache-2.0
"""Euler's method, and with noise drawn anew at each step (k-diffusion)."""

import numpy as np

from gift_jax.sampling.schedulers import levels
from gift_jax.sampling.schedulers.rows import (
    NOISE,
    Config,
    Row,
    Schedule,
    Scheduler,
    X,
    k_scale,
    schedule_of,
    slope,
)


def schedule(config: Config, steps: int) -> Schedule:
    """Source: diffusers `EulerDiscreteScheduler`."""
    t, sigmas = levels.k_levels(config, steps)
    if config["timestep_type"] == "continuous" and _is_velocity(config):
        t = 0.25 * np.log(sigmas[:steps])
    sigmas = np.append(sigmas, levels.last_sigma(config, sigmas))
    return schedule_of(
        (
            Row(t[i], X + slope(config, s) * (sigmas[i + 1] - s), scale=k_scale(s))
            for i, s in enumerate(sigmas[:steps])
        ),
        levels.k_first_scale(sigmas, config),
    )


def _is_velocity(config):
    return config["prediction_type"] == "v_prediction"


def ancestral(config: Config, steps: int) -> Schedule:
    """Source: diffusers `EulerAncestralDiscreteScheduler`."""
    t, sigmas = levels.k_levels(config, steps)
    sigmas = np.append(sigmas, 0.0)
    rows = []
    for i, sigma in enumerate(sigmas[:-1]):
        down, up = down_and_up(sigma, sigmas[i + 1])
        x = X + slope(config, sigma) * (down - sigma) + up * NOISE
        rows.append(Row(t[i], x, scale=k_scale(sigma)))
    return schedule_of(rows, levels.k_first_scale(sigmas, config))


def down_and_up(sigma: float, after: float) -> tuple[float, float]:
    """Returns the level that a step goes down to, and of the noise added after it."""
    up = np.sqrt(after**2 * (sigma**2 - after**2) / sigma**2)
    return np.sqrt(after**2 - up**2), up


SCHEDULER = Scheduler(
    "euler",
    "EulerDiscreteScheduler",
    schedule,
    only={"timestep_type": ("discrete", "continuous")},
)
ANCESTRAL = Scheduler("euler_ancestral", "EulerAncestralDiscreteScheduler", ancestral)
