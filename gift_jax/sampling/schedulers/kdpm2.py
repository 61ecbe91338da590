# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver-2 in sigma (k-diffusion), and with noise drawn anew at each step."""

import numpy as np

from gift_jax.sampling.schedulers import levels
from gift_jax.sampling.schedulers.euler import down_and_up
from gift_jax.sampling.schedulers.rows import (
    MEMORY,
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

_START = MEMORY[0]


def schedule(config: Config, steps: int) -> Schedule:
    """Source: diffusers `KDPM2DiscreteScheduler`."""
    return _schedule(config, steps, lambda sigma, after: (after, after, 0.0))


def ancestral(config: Config, steps: int) -> Schedule:
    """Source: diffusers `KDPM2AncestralDiscreteScheduler`."""

    def ends(sigma, after):
        down, up = down_and_up(sigma, after)
        return down, down, up

    return _schedule(config, steps, ends)


def _schedule(config, steps, ends):
    """Args: ends: (sigma, the next) -> (level that the middle is half way to in the
    logarithm, level that the step goes to, level of the noise then added)."""
    t, sigmas = levels.k_levels(config, steps, whole_karras=True)
    sigmas = np.append(sigmas, 0.0)
    train = levels.training_sigmas(config)
    rows = []
    for i, sigma in enumerate(sigmas[:-1]):
        half, down, up = ends(sigma, sigmas[i + 1])
        middle = np.sqrt(sigma * half)
        x = X + slope(config, sigma) * (middle - sigma)
        rows.append(Row(t[i], x, (X,), k_scale(sigma)))
        if sigmas[i + 1] > 0:
            x = _START + slope(config, middle) * (down - sigma) + up * NOISE
            t_middle = levels.timesteps_at(np.array([middle]), train)[0]
            rows.append(Row(t_middle, x, scale=k_scale(middle)))
    return schedule_of(rows, levels.k_first_scale(sigmas, config))


SCHEDULER = Scheduler("kdpm2", "KDPM2DiscreteScheduler", schedule)
ANCESTRAL = Scheduler(
    "kdpm2_ancestral",
    "KDPM2AncestralDiscreteScheduler",
    ancestral,
    only={"beta_schedule": ("linear", "scaled_linear")},  # NaN in PyTorch's float32
)
