# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver++ for the SDE (k-diffusion): two calls a step, one Brownian path."""

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
    denoised,
    k_scale,
    schedule_of,
)

_START, _FIRST_NOISE = MEMORY[:2]


def schedule(config: Config, steps: int) -> Schedule:
    """Source: diffusers `DPMSolverSDEScheduler`.

    Its noise is the increment of a Brownian path over each step and over the step's
    first half, which is drawn here in two independent parts.
    """
    t, sigmas = levels.k_levels(config, steps, karras_bounds=False)
    sigmas = np.append(sigmas, 0.0)
    train = levels.training_sigmas(config)
    first_scale = levels.k_first_scale(sigmas, config)
    return schedule_of(_rows(config, t, sigmas, train), first_scale)


def _rows(config, t, sigmas, train):
    for i, sigma in enumerate(sigmas[:-1]):
        after, scale = sigmas[i + 1], k_scale(sigma)
        x0 = denoised(config, sigma)
        if after == 0:
            yield Row(t[i], x0, scale=scale)
            return
        middle = np.sqrt(sigma * after)
        yield Row(t[i], _ancestral(X, x0, sigma, middle, NOISE), (X, NOISE), scale)
        first = np.sqrt((sigma - middle) / (sigma - after))
        noise = first * _FIRST_NOISE + np.sqrt(1 - first**2) * NOISE
        x = _ancestral(_START, denoised(config, middle), sigma, after, noise)
        t_middle = levels.timesteps_at(np.array([middle]), train)[0]
        yield Row(t_middle, x, scale=k_scale(middle))


def _ancestral(x, x0, sigma, after, noise):
    down, up = down_and_up(sigma, after)
    return down / sigma * x + (1 - down / sigma) * x0 + up * noise


SCHEDULER = Scheduler(
    "dpmsolver_sde",
    "DPMSolverSDEScheduler",
    schedule,
    unused=("noise_sampler_seed",),  # the noise is of the samples' own seed
)
