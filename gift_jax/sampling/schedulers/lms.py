# SPDX-License-Identifier: Apache-2.0
"""Linear multistep in sigma (k-diffusion), of order 4."""

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
    keep,
    schedule_of,
    slope,
)

_ORDER = 4
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(_ORDER)  # exact up to degree 7


def schedule(config: Config, steps: int) -> Schedule:
    """Source: diffusers `LMSDiscreteScheduler`."""
    t, sigmas = levels.k_levels(config, steps, karras_bounds=False)
    sigmas = np.append(sigmas, 0.0)
    first_scale = levels.k_first_scale(sigmas, config)
    return schedule_of(_rows(config, t, sigmas), first_scale)


def _rows(config, t, sigmas):
    for i, sigma in enumerate(sigmas[:-1]):
        now = slope(config, sigma)
        slopes = (now, *MEMORY)[: min(i + 1, _ORDER)]
        weights = _integrals(sigmas, i, len(slopes))
        x = X + sum(w * d for w, d in zip(weights, slopes, strict=True))
        yield Row(t[i], x, keep(now, _ORDER - 1), k_scale(sigma))


def _integrals(sigmas, i, order):
    """Returns the integrals over a step of the slopes' Lagrange polynomials."""
    start, end = sigmas[i], sigmas[i + 1]
    tau = (start + end) / 2 + (end - start) / 2 * _NODES
    known = sigmas[i - np.arange(order)]
    for k in range(order):
        others = np.delete(known, k)
        values = np.prod((tau[:, None] - others) / (known[k] - others), axis=1)
        yield (end - start) / 2 * np.sum(_WEIGHTS * values)


SCHEDULER = Scheduler("lms", "LMSDiscreteScheduler", schedule)
