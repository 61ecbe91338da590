# SPDX-License-Identifier: Apache-2.0
"""Euler's and Heun's methods in sigma, where X = (1 - sigma) x0 + sigma eps.

The network's output is the slope dX / dsigma, so that a step of Euler's adds a multiple
of it. Source: Esser et al. 2024, arXiv:2403.03206.
"""

import numpy as np

from gift_jax.models import flow_schedule
from gift_jax.sampling.schedulers.rows import (
    MEMORY,
    Config,
    M,
    Row,
    Schedule,
    Scheduler,
    X,
    schedule_of,
)

_START, _SLOPE = MEMORY[:2]


def levels(config: Config, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (t "steps", sigmas "steps + 1", the last 0), float32 as PyTorch rounds.

    The bounds are those of training, shifted already, and are shifted once more; or the
    levels are those of a pipeline that hands them over.

    Source: diffusers `FlowMatchEulerDiscreteScheduler.set_timesteps`.
    """
    T = config["num_train_timesteps"]
    if flow_schedule.TOKENS in config:
        sigmas = flow_schedule.image_sigmas(config, steps)
    else:
        high, low = flow_schedule.training_sigmas(config)[[0, -1]].astype(np.float64)
        sigmas = np.linspace(high * T, low * T, steps) / T
        sigmas = flow_schedule.shifted(config, sigmas).astype(np.float32)
    return sigmas * np.float32(T), np.append(sigmas, np.float32(0))


def euler(config: Config, steps: int) -> Schedule:
    """Source: diffusers `FlowMatchEulerDiscreteScheduler`."""
    t, sigmas = levels(config, steps)
    pairs = zip(t, np.diff(sigmas), strict=True)
    return schedule_of(Row(time, X + M * dt) for time, dt in pairs)


def heun(config: Config, steps: int) -> Schedule:
    """Two calls a step but one. Source: diffusers `FlowMatchHeunDiscreteScheduler`."""
    return schedule_of(_heun_rows(*levels(config, steps)))


def _heun_rows(t, sigmas):
    for i, dt in enumerate(np.diff(sigmas)):
        yield Row(t[i], X + M * dt, (X, M))
        if sigmas[i + 1] > 0:
            yield Row(t[i + 1], _START + (_SLOPE + M) / 2 * dt)


EULER = Scheduler("flow_euler", "FlowMatchEulerDiscreteScheduler", euler)
HEUN = Scheduler("flow_heun", "FlowMatchHeunDiscreteScheduler", heun)
