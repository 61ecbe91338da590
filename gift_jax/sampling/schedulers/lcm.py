# SPDX-License-Identifier: Apache-2.0
"""Consistency sampling: LCM (arXiv:2310.04378) and TCD (arXiv:2402.19159)."""

import numpy as np

from gift_jax.models.sd.scheduler_config import alphas_cumprod
from gift_jax.runtime.errors import UserError
from gift_jax.sampling.schedulers.rows import (
    NOISE,
    Config,
    Row,
    Schedule,
    Scheduler,
    X,
    refuse,
    schedule_of,
    x0_and_eps,
)

_SIGMA_DATA = 0.5


def schedule(config: Config, steps: int) -> Schedule:
    """Source: diffusers `LCMScheduler`."""
    return schedule_of(_lcm_rows(config, _timesteps(config, steps)))


def _lcm_rows(config, ts):
    abar_T = alphas_cumprod(config)
    for i, t in enumerate(ts):
        x0, _ = x0_and_eps(config, np.sqrt(abar_T[t]), np.sqrt(1 - abar_T[t]))
        scaled = t * config["timestep_scaling"]
        norm = np.hypot(scaled, _SIGMA_DATA)
        x = scaled / norm * x0 + (_SIGMA_DATA / norm) ** 2 * X
        if i + 1 < len(ts):
            abar = abar_T[ts[i + 1]]
            x = np.sqrt(abar) * x + np.sqrt(1 - abar) * NOISE
        yield Row(t, x)


def tcd(config: Config, steps: int) -> Schedule:
    """Source: diffusers `TCDScheduler`, which a pipeline calls with eta = 0."""
    return schedule_of(_tcd_rows(config, _timesteps(config, steps)))


def _tcd_rows(config, ts):
    abar_T = alphas_cumprod(config)
    for t, before in zip(ts, [*ts[1:], 0], strict=True):
        x0, eps = x0_and_eps(config, np.sqrt(abar_T[t]), np.sqrt(1 - abar_T[t]))
        abar = abar_T[before]
        yield Row(t, np.sqrt(abar) * x0 + np.sqrt(1 - abar) * eps)


def _timesteps(config, steps):
    """Returns `steps` of the timesteps that the model was distilled at, descending."""
    T, count = config["num_train_timesteps"], config["original_inference_steps"]
    if not 1 <= count <= T:
        refuse("original_inference_steps", count, f"must be from 1 to {T}")
    if steps > count:
        raise UserError(
            f"steps={steps} must be at most original_inference_steps={count} of the "
            "scheduler"
        )
    distilled = (np.arange(1, count + 1) * (T // count) - 1)[::-1]
    return distilled[np.linspace(0, count, steps, endpoint=False).astype(int)]


SCHEDULER = Scheduler(
    "lcm",
    "LCMScheduler",
    schedule,
    unused=("timestep_spacing", "set_alpha_to_one"),
)
TCD = Scheduler(
    "tcd",
    "TCDScheduler",
    tcd,
    unused=("timestep_spacing", "set_alpha_to_one", "timestep_scaling"),
)
