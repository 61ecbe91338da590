# SPDX-License-Identifier: Apache-2.0
"""Similarity gap ratios, how much a defense reduces an attack, and their intervals."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

OVER = ("mean", "peak", "final")  # of an attack's trajectory


def gap_ratio(undefended: float, defended: float) -> float | None:
    """Returns (M(original) - M(defended)) / M(original); None if M(original) is 0.

    On the harmful side 1 means that nothing is left of what the attack reached, 0 that
    the defense changed nothing, below 0 that it helped the attack. On the benign side
    the same number is the defense's cost. M is any similarity that is 0 for nothing in
    common.

    Source: SGR of Zheng & Yeh 2024, arXiv:2311.18815, eq. 7; both sides apart, as CLAMP
    (CVPR 2026) reports them.
    """
    if undefended < 0 or defended < 0:
        raise ValueError(f"similarities must be at least 0: {undefended}, {defended}")
    return None if undefended == 0 else 1.0 - defended / undefended


def reductions(values: Sequence[float]) -> dict[str, float]:
    """Returns a trajectory's mean, its peak and its end. Args: values: in order."""
    if not len(values):
        raise ValueError("a trajectory without a point")
    parts = {"mean": np.mean, "peak": np.max, "final": lambda m: m[-1]}
    return {name: float(parts[name](values)) for name in OVER}


def concept_ratio(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Returns a concept's gap ratio. Args: pairs: (undefended, defended) by seed."""
    undefended, defended = np.mean(np.asarray(pairs, np.float64), axis=0)
    return gap_ratio(float(undefended), float(defended))


def ratio_interval(
    concepts: Sequence[Sequence[tuple[float, float]]],
    *,
    level: float = 0.95,
    num: int = 4000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the bootstrap interval of the mean `concept_ratio` over concepts.

    Concepts are drawn with replacement, and of each its seeds; a defended run stays
    with the original's of its seed. Of one concept with one seed the interval is its
    ratio, and says nothing.

    Args: concepts: of each the pairs, (undefended, defended); num: resamples.
    Source: the two-stage bootstrap of clusters, Davison & Hinkley 1997, section 3.8.
    """

    def ratio(pairs):  # "draws seeds 2"
        undefended, defended = np.moveaxis(pairs.sum(axis=1), 1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(undefended > 0, 1 - defended / undefended, np.nan)

    return nested_interval(concepts, ratio, level=level, num=num, seed=seed)


def nested_interval(
    groups: Sequence[Sequence[Any]],
    statistic: Callable[[np.ndarray], np.ndarray] = lambda x: x.mean(axis=1),
    *,
    level: float = 0.95,
    num: int = 4000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the bootstrap interval of the mean of the groups' statistics.

    Groups, the concepts, are drawn with replacement, and of each its members, the
    seeds. Args: statistic: members "draws members ..." -> "draws"; NaN is left out.
    Source: as `ratio_interval`.
    """
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(groups), size=(num, len(groups)))
    values = np.full(rows.shape, np.nan)
    for i, group in enumerate(groups):
        members, here = np.asarray(group, np.float64), rows == i
        draws = rng.integers(len(members), size=(here.sum(), len(members)))
        values[here] = statistic(members[draws])
    means = np.nanmean(values[~np.isnan(values).all(axis=1)], axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap(
    values: Sequence[float], *, level: float = 0.95, num: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of the mean over concepts.

    Args: values: one number a concept; of a single one the interval is that number, and
      says nothing. num: resamples.
    Source: Efron & Tibshirani 1993, chapter 13.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"one number a concept is needed, not shape {values.shape}")
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(num, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
