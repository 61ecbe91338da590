# SPDX-License-Identifier: Apache-2.0
"""Two sets of pictures compared as distributions: FID, KID, precision and recall.

They take features, "N D", that some backbone made. Only Inception's are FID and KID;
of any other backbone the same sums are named "fd" and "kd".
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gift_jax.metrics.base import MetricResult
from gift_jax.runtime.errors import UserError

SUBSET, SUBSETS = 1000, 100  # of KID, as its authors' code has them
NEAREST = 3  # of precision and recall, the paper's
_ROWS = 1024  # of a distance matrix at a time


def fid(
    real_ND: np.ndarray, generated_MD: np.ndarray, made: Mapping[str, Any]
) -> MetricResult:
    """Returns the Frechet distance of the Gaussians that fit the two sets.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64. The root's trace is the sum
    of the singular values of X1 X2' / sqrt((N-1)(M-1)), where X are the centred
    features (of which QR keeps D rows): no root of a singular matrix is taken.

    Args: real_ND, generated_MD: float features of one backbone. made: what made them
      (backbone, version, resolution, protocol ...), for `how`.
    Raises: UserError if a set has fewer than two pictures, or another D,
      or features that are not finite.
    Source: Heusel et al. 2017, arXiv:1706.08500, section 3; covariances over N - 1, as
      pytorch-fid has them.
    """
    real_ND, generated_MD = _checked(real_ND, generated_MD, at_least=2)
    gap_D = real_ND.mean(axis=0) - generated_MD.mean(axis=0)
    parts = []
    for x_ND in (real_ND, generated_MD):
        triangle = np.linalg.qr(x_ND - x_ND.mean(axis=0, keepdims=True), mode="r")
        parts.append(triangle / np.sqrt(len(x_ND) - 1))
    a, b = parts
    shared = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    value = gap_D @ gap_D + np.sum(a**2) + np.sum(b**2) - 2 * shared
    how = _provenance(made, real_ND, generated_MD)
    fewest = min(len(real_ND), len(generated_MD))
    if fewest <= real_ND.shape[1]:
        how["caution"] = (
            f"{fewest} pictures for {real_ND.shape[1]} features: the covariance is "
            "singular and the distance biased upwards; compare equal counts only"
        )
    value = max(float(value), 0.0)
    return MetricResult(_name("fid", "fd", made), value, None, "less alike", how)


def kid(
    real_ND: np.ndarray,
    generated_MD: np.ndarray,
    made: Mapping[str, Any],
    *,
    subset: int = SUBSET,
    subsets: int = SUBSETS,
    seed: int = 0,
) -> MetricResult:
    """Returns the squared kernel distance of the two sets, mean over random subsets.

    Unbiased, and so may be below 0. Kernel (x'y / D + 1)^3. `how` has the standard
    deviation over the subsets.

    Args: real_ND, generated_MD, made: see `fid`. subset: pictures drawn from each set,
      without repeats; fewer if a set has not as many. subsets: their count. seed: of
      the draws.
    Raises: UserError if a set or `subset` has fewer than two, or another D.
    Source: Binkowski et al. 2018, arXiv:1801.01401, eq. 4.
    """
    real_ND, generated_MD = _checked(real_ND, generated_MD, at_least=2)
    wanted, subset = subset, min(subset, len(real_ND), len(generated_MD))
    if subset < 2 or subsets < 1:
        raise UserError(f"subset={subset}, subsets={subsets} must be at least 2 and 1")
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(subsets):
        real = real_ND[rng.choice(len(real_ND), subset, replace=False)]
        generated = generated_MD[rng.choice(len(generated_MD), subset, replace=False)]
        found.append(_kernel_distance(real, generated))
    how = _provenance(made, real_ND, generated_MD) | {
        "kernel": "(x.y / D + 1)^3",
        "subset": subset,
        "subsets": subsets,
        "seed": seed,
        "std": round(float(np.std(found)), 8),
    }
    if subset < wanted:
        how["caution"] = (
            f"subsets of {subset}, the smaller set whole, not {wanted}: they overlap, "
            "and the standard deviation over them is too small"
        )
    value = float(np.mean(found))
    return MetricResult(_name("kid", "kd", made), value, None, "less alike", how)


def precision_recall(
    real_ND: np.ndarray,
    generated_MD: np.ndarray,
    made: Mapping[str, Any],
    *,
    nearest: int = NEAREST,
) -> tuple[MetricResult, MetricResult]:
    """Returns (precision, recall).

    A set's region is the union of balls about its pictures, each as large as reaches
    the k-th nearest other one. Precision is the share of generated pictures in the real
    region (samples: 1 or 0 of each); recall the share of real ones in the generated.

    Args: real_ND, generated_MD, made: see `fid`. nearest: k.
    Raises: UserError if a set has no k other pictures, or another D.
    Source: Kynkaanniemi et al. 2019, arXiv:1904.06991, eqs. 1 and 2, k = 3.
    """
    if nearest < 1:
        raise UserError(f"nearest={nearest} must be at least 1")
    real_ND, generated_MD = _checked(real_ND, generated_MD, at_least=nearest + 1)
    how = _provenance(made, real_ND, generated_MD) | {"nearest": nearest}
    inside_M = _inside(generated_MD, real_ND, nearest)
    inside_N = _inside(real_ND, generated_MD, nearest)
    return (
        MetricResult(
            "precision",
            float(np.mean(inside_M)),
            inside_M.astype(np.float32),
            "more generated pictures look real",
            how,
        ),
        MetricResult(
            "recall",
            float(np.mean(inside_N)),
            None,
            "more real pictures can be generated",
            how,
        ),
    )


def _kernel_distance(x_ND, y_ND):
    n, dim = x_ND.shape

    def kernel(a, b):
        return (a @ b.T / dim + 1.0) ** 3

    within = sum(
        k.sum() - np.trace(k) for k in (kernel(x_ND, x_ND), kernel(y_ND, y_ND))
    )
    return within / (n * (n - 1)) - 2 * kernel(x_ND, y_ND).mean()


def _inside(x_ND, y_MD, nearest):
    """Returns bool "N": which of x lie in the region of y."""
    radii_M = np.concatenate(
        [
            # the picture itself is the nearest of all, at distance 0
            np.partition(_squared_distances(rows, y_MD), nearest, axis=1)[:, nearest]
            for rows in _blocks(y_MD)
        ]
    )
    return np.concatenate(
        [
            np.any(_squared_distances(rows, y_MD) <= radii_M[None], axis=1)
            for rows in _blocks(x_ND)
        ]
    )


def _blocks(x_ND):
    return [x_ND[first : first + _ROWS] for first in range(0, len(x_ND), _ROWS)]


def _squared_distances(x_ND, y_MD):
    squares = np.sum(x_ND**2, axis=1)[:, None] + np.sum(y_MD**2, axis=1)[None]
    return np.maximum(squares - 2 * x_ND @ y_MD.T, 0.0)


def _checked(real_ND, generated_MD, at_least):
    """Returns both in float64; UserError if they cannot be compared."""
    real_ND, generated_MD = (np.asarray(x, np.float64) for x in (real_ND, generated_MD))
    if real_ND.ndim != 2 or real_ND.shape[1:] != generated_MD.shape[1:]:
        raise UserError(
            f"features of shapes {list(real_ND.shape)} and {list(generated_MD.shape)} "
            'must be "N D" and "M D" of one backbone'
        )
    fewest = min(len(real_ND), len(generated_MD))
    if fewest < at_least:
        raise UserError(f"a set of {fewest} pictures; must have {at_least} or more")
    if not (np.isfinite(real_ND).all() and np.isfinite(generated_MD).all()):
        raise UserError("features must be finite; the backbone gave inf or nan")
    return real_ND, generated_MD


def _provenance(made, real_ND, generated_MD):
    counts = {"n_real": len(real_ND), "n_generated": len(generated_MD)}
    return dict(made) | counts | {"features": real_ND.shape[1]}


def _name(of_inception, of_others, made):
    is_inception = "inception" in str(made.get("backbone", "")).lower()
    return of_inception if is_inception else of_others
