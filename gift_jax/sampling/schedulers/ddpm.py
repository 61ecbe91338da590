# SPDX-License-Identifier: Apache-2.0
"""DDPM's ancestral sampling (arXiv:2006.11239)."""

import numpy as np

from gift_jax.models.sd.scheduler_config import alphas_cumprod
from gift_jax.sampling.schedulers.levels import spaced
from gift_jax.sampling.schedulers.rows import (
    NOISE,
    Config,
    Row,
    Schedule,
    Scheduler,
    X,
    schedule_of,
    x0_and_eps,
)


def schedule(config: Config, steps: int) -> Schedule:
    """Source: diffusers `DDPMScheduler`."""
    return schedule_of(_rows(config, steps))


def _rows(config, steps):
    abar_T = alphas_cumprod(config)
    ts = spaced(config, steps).astype(int)
    for t, before in zip(ts, [*ts[1:], -1], strict=True):
        now, then = abar_T[t], abar_T[before] if before >= 0 else 1.0
        x0, _ = x0_and_eps(config, np.sqrt(now), np.sqrt(1 - now))
        beta = 1 - now / then
        mean = (np.sqrt(then) * beta * x0 + np.sqrt(now / then) * (1 - then) * X) / (
            1 - now
        )
        variance = max((1 - then) / (1 - now) * beta, 1e-20)
        if config["variance_type"] == "fixed_large":
            variance = beta
        yield Row(t, mean + (np.sqrt(variance) if t > 0 else 0.0) * NOISE)


SCHEDULER = Scheduler(
    "ddpm",
    "DDPMScheduler",
    schedule,
    only={"variance_type": ("fixed_small", "fixed_small_log", "fixed_large")},
)
