# SPDX-License-Identifier: Apache-2.0
"""Heun's method in sigma (arXiv:2206.00364, algorithm 1): two calls a step but one."""

import numpy as np

from gift_jax.sampling.schedulers import levels
from gift_jax.sampling.schedulers.rows import (
    MEMORY,
    Config,
    Row,
    Schedule,
    Scheduler,
    X,
    k_scale,
    schedule_of,
    slope,
)

_START, _SLOPE = MEMORY[:2]


def schedule(config: Config, steps: int) -> Schedule:
    """Source: diffusers `HeunDiscreteScheduler`."""
    t, sigmas = levels.k_levels(config, steps)
    sigmas = np.append(sigmas, 0.0)
    first_scale = levels.k_first_scale(sigmas, config)
    return schedule_of(_rows(config, t, sigmas), first_scale)


def _rows(config, t, sigmas):
    for i, sigma in enumerate(sigmas[:-1]):
        after = sigmas[i + 1]
        first, dt = slope(config, sigma), after - sigma
        yield Row(t[i], X + first * dt, (X, first), k_scale(sigma))
        if after > 0:
            mean = (_SLOPE + slope(config, after)) / 2
            yield Row(t[i + 1], _START + mean * dt, scale=k_scale(after))


SCHEDULER = Scheduler("heun", "HeunDiscreteScheduler", schedule)
