# SPDX-License-Identifier: Apache-2.0
"""UniPC (arXiv:2302.04867): an output first corrects the latents it is of."""

import math

import numpy as np

from gift_jax.sampling.schedulers import levels
from gift_jax.sampling.schedulers.rows import (
    MEMORY,
    Config,
    Row,
    Schedule,
    Scheduler,
    X,
    keep,
    refuse,
    schedule_of,
    x0_and_eps,
)

_START, _OUTPUTS = MEMORY[0], MEMORY[1:]
_TYPES = {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}  # of another class


def schedule(config: Config, steps: int) -> Schedule:
    """Source: diffusers `UniPCMultistepScheduler`."""
    if config["solver_p"] is not None:
        refuse("solver_p", config["solver_p"], "must be null")
    if config["shift_terminal"] is not None:
        refuse("shift_terminal", config["shift_terminal"], "must be null")
    t, sigmas = levels.solver_levels(config, steps)
    own = levels.has_other_sigmas(config)
    sigmas = np.append(sigmas, levels.last_sigma(config, sigmas, own=own))
    return schedule_of(_rows(config, t, sigmas.astype(np.float32).astype(np.float64)))


def _rows(config, ts, sigmas):
    alpha = 1 / np.hypot(sigmas, 1)
    sigma, lam = sigmas * alpha, -np.log(sigmas)
    update = _updater(config, alpha, sigma, lam)
    steps, before = len(ts), 0
    for i, t in enumerate(ts):
        x0, eps = x0_and_eps(config, alpha[i], sigma[i])
        now = x0 if config["predict_x0"] else eps
        x = X
        if i > 0 and i - 1 not in config["disable_corrector"]:
            x = update(_START, i - 1, i, _OUTPUTS[:before], now)
        order = min(config["solver_order"], i + 1)
        if config["lower_order_final"]:
            order = min(order, steps - i)
        outputs = keep(now, 1) + _OUTPUTS[: order - 1]
        memory = (x, now, *_OUTPUTS[: config["solver_order"] - 1])
        yield Row(t, update(x, i, i + 1, outputs), memory)
        before = order


def _updater(config, alpha, sigma, lam):
    """Returns (x, start, end, outputs at start and before, output at end or None) -> x.

    Predictor (without the output at the end) and corrector, equations 3 and 9.
    """
    of_x0 = config["predict_x0"]
    kind = _TYPES.get(config["solver_type"], config["solver_type"])

    def update(x, start, end, outputs, at_end=None):
        h = lam[end] - lam[start]
        hh = -h if of_x0 else h
        scale = hh if kind == "bh1" else np.expm1(hh)
        level, keep_x = alpha[end], sigma[end] / sigma[start]
        if not of_x0:
            level, keep_x = sigma[end], alpha[end] / alpha[start]
        r = [(lam[start - k] - lam[start]) / h for k in range(1, len(outputs))]
        slopes = [(o - outputs[0]) / rk for o, rk in zip(outputs[1:], r, strict=True)]
        if at_end is not None:
            r, slopes = [*r, 1.0], [*slopes, at_end - outputs[0]]
        new = keep_x * x - level * np.expm1(hh) * outputs[0]
        if not slopes:
            return new - level * scale * 0.0 * X  # not finite where PyTorch is not
        rho = _weights(np.array(r), hh, scale)
        if len(slopes) == 1:
            rho = [0.5]
        return new - level * scale * sum(
            w * d for w, d in zip(rho, slopes, strict=True)
        )

    return update


def _weights(r, hh, scale):
    """Returns rho of equation 5: sum_k rho_k r_k^n = n! phi_n(h) / B(h)."""
    phi = np.expm1(hh) / hh - 1
    right = []
    for n in range(1, len(r) + 1):
        right.append(phi * math.factorial(n) / scale)
        phi = phi / hh - 1 / math.factorial(n + 1)
    left = r[None] ** np.arange(len(r))[:, None]
    if not np.all(np.isfinite(left)) or not np.all(np.isfinite(right)):
        return np.full(len(r), np.nan)
    return np.linalg.solve(left, np.array(right))


SCHEDULER = Scheduler(
    "unipc",
    "UniPCMultistepScheduler",
    schedule,
    only={
        "solver_order": (1, 2, 3, 4),
        "solver_type": ("bh1", "bh2", "midpoint", "heun", "logrho"),
        "use_flow_sigmas": (False,),
        "use_dynamic_shifting": (False,),
    },
    unused=("flow_shift", "time_shift_type"),
)
