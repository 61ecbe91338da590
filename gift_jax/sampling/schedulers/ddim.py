# SPDX-License-Identifier: Apache-2.0
"""DDIM (arXiv:2010.02502), as a pipeline calls it: eta = 0."""

import numpy as np

from gift_jax.models.sd.scheduler_config import alphas_cumprod
from gift_jax.sampling.schedulers.levels import spaced
from gift_jax.sampling.schedulers.rows import (
    Config,
    Row,
    Schedule,
    Scheduler,
    schedule_of,
    x0_and_eps,
)


def schedule(config: Config, steps: int) -> Schedule:
    """Source: diffusers `DDIMScheduler`."""
    abar_T = alphas_cumprod(config)
    return schedule_of(_rows(config, steps, abar_T))


def _rows(config, steps, abar_T):
    stride = len(abar_T) // steps
    for t in spaced(config, steps).astype(int):
        before = t - stride
        abar = abar_T[before] if before >= 0 else final_abar(config, abar_T)
        x0, eps = x0_and_eps(config, np.sqrt(abar_T[t]), np.sqrt(1 - abar_T[t]))
        yield Row(t, np.sqrt(abar) * x0 + np.sqrt(1 - abar) * eps)


def final_abar(config: Config, abar_T: np.ndarray) -> float:
    """Returns the cumulative alpha that the last step ends at."""
    return 1.0 if config["set_alpha_to_one"] else abar_T[0]


SCHEDULER = Scheduler("ddim", "DDIMScheduler", schedule)
