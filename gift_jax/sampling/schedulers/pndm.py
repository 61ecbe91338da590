# SPDX-License-Identifier: Apache-2.0
"""PNDM (arXiv:2202.09778): linear multistep, maybe after Runge-Kutta steps."""

import numpy as np

from gift_jax.models.sd.scheduler_config import alphas_cumprod
from gift_jax.runtime.errors import UserError
from gift_jax.sampling.schedulers.ddim import final_abar
from gift_jax.sampling.schedulers.levels import spaced
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

# Adams-Bashforth weights of the newest 1, 2, 3 and 4 outputs (PNDM, eq. 12)
_MULTISTEP = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
# memory: earlier outputs, newest first; the latents that a step started from; a sum
_OUTPUTS, _START, _SUM = MEMORY[:3], MEMORY[3], MEMORY[4]


def schedule(config: Config, steps: int) -> Schedule:
    """Source: diffusers `PNDMScheduler`."""
    ts = spaced(config, steps).astype(int)
    if config["skip_prk_steps"]:
        return schedule_of(_multistep_from_one(config, steps, ts))
    if steps < 4:
        raise UserError(
            f"steps={steps} must be at least 4 for PNDM with skip_prk_steps=False"
        )
    return schedule_of(_runge_kutta_first(config, steps, ts))


def _multistep_from_one(config, steps, ts):
    """The second call redoes the first step (Heun)."""
    move, stride = _mover(config), config["num_train_timesteps"] // steps
    calls = [*ts[:2], *ts[1:]]
    for i, t in enumerate(calls):
        if i == 1:
            output = (M + _OUTPUTS[0]) / 2
            yield Row(t, move(_START, t + stride, t, output), MEMORY)
        else:
            yield _multistep_row(move, t, t - stride, min(i - (i > 1), 3))


def _multistep_row(move, t, before, order):
    outputs = (M, *_OUTPUTS)
    output = sum(w * e for w, e in zip(_MULTISTEP[order], outputs, strict=False))
    return Row(t, move(X, t, before, output), (*outputs[:3], X))


def _runge_kutta_first(config, steps, ts):
    """Three steps of four calls each; then multistep from the fourth timestep on."""
    move, stride = _mover(config), config["num_train_timesteps"] // steps
    half = stride // 2
    for t, after in zip(ts[:3], ts[1:4], strict=True):
        between = after + half
        old = _OUTPUTS[:2]
        start = (M, *old, X, M / 6)
        yield Row(t, move(X, t, t - half, M), start)
        for call in (1, 2):
            end = between - (0 if call == 1 else half)
            memory = (*_OUTPUTS, _START, _SUM + M / 3)
            yield Row(between, move(_START, t, end, M), memory)
        yield Row(after, move(_START, t, after, _SUM + M / 6), MEMORY[:4])
    for t in ts[3:]:
        yield _multistep_row(move, t, t - stride, 3)


def _mover(config):
    """Returns (latents, t, timestep before, output) -> the latents there (eq. 11)."""
    abar_T = alphas_cumprod(config)

    def move(x, t, before, output):
        a = abar_T[t]
        b = abar_T[before] if before >= 0 else final_abar(config, abar_T)
        if config["prediction_type"] == "v_prediction":
            output = np.sqrt(a) * output + np.sqrt(1 - a) * x
        rate = (b - a) / (a * np.sqrt(1 - b) + np.sqrt(a * (1 - a) * b))
        return np.sqrt(b / a) * x - rate * output

    return move


SCHEDULER = Scheduler("pndm", "PNDMScheduler", schedule)
