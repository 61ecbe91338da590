# SPDX-License-Identifier: Apache-2.0
"""DEIS (arXiv:2204.13902) in log(rho): outputs extrapolated by polynomials."""

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
    schedule_of,
    x0_and_eps,
)

_SHORT = 15  # fewer steps than this end with lower orders


def schedule(config: Config, steps: int) -> Schedule:
    """Source: diffusers `DEISMultistepScheduler`."""
    t, sigmas = levels.solver_levels(config, steps)
    last = levels.training_sigmas(config)[0]
    if levels.has_other_sigmas(config):
        last = sigmas[-1]
    sigmas = np.append(sigmas, last).astype(np.float32).astype(np.float64)
    return schedule_of(_rows(config, t, sigmas))


def _rows(config, ts, rho):
    steps, alpha = len(ts), 1 / np.hypot(rho, 1)
    short = config["lower_order_final"] and steps < _SHORT
    for i, t in enumerate(ts):
        order = min(config["solver_order"], i + 1)
        if short:
            order = min(order, steps - i)
        _, eps = x0_and_eps(config, alpha[i], rho[i] * alpha[i])
        x = X / alpha[i]
        outputs = (eps, *MEMORY)[:order]
        for w, output in zip(_integrals(rho, i, order), outputs, strict=True):
            x = x + w * output
        yield Row(t, alpha[i + 1] * x, keep(eps, 2))


def _integrals(rho, i, order):
    """Returns the integrals over rho of the Lagrange polynomials in log(rho)."""
    logs = np.log(rho[i - np.arange(order)])
    for k in range(order):
        others = np.delete(logs, k)
        # in powers of log(rho), highest first; then integrated by parts
        powers = np.atleast_1d(np.poly(others)) / np.prod(logs[k] - others)
        yield _integral(powers, rho[i + 1]) - _integral(powers, rho[i])


def _integral(powers, rho):
    """Returns an antiderivative of a polynomial in log(rho), at rho."""
    total, derivative, sign = 0.0, powers, 1.0
    while len(derivative):
        total += sign * np.polyval(derivative, np.log(rho))
        derivative, sign = np.polyder(derivative) if len(derivative) > 1 else (), -sign
    return rho * total


SCHEDULER = Scheduler(
    "deis",
    "DEISMultistepScheduler",
    schedule,
    only={
        "algorithm_type": ("deis", "dpmsolver", "dpmsolver++"),
        "solver_type": ("logrho", "midpoint", "heun", "bh1", "bh2"),
        "solver_order": (1, 2, 3),
        "use_flow_sigmas": (False,),
    },
    unused=("flow_shift", "use_dynamic_shifting", "time_shift_type"),
)
