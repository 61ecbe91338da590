# SPDX-License-Identifier: Apache-2.0
"""From a benchmark's cells to how much each defense reduces each attack."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gift_jax.benchmark import gap_ratios

ORIGINAL, BEFORE = "original", "before"  # no defense, no attack
HARMFUL, BENIGN, RETAINED = SIDES = ("harmful", "benign", "retained")
ATTACKED_SIDES = (HARMFUL, BENIGN)
Rows = list[dict[str, Any]]


def summarize(cells: Iterable[dict[str, Any]], metrics: Sequence[str]) -> Rows:
    """Returns similarity gap ratios against the model without a defense.

    Args: cells: as results.json holds them. metrics: names of similarities (higher is
      more alike); below 0 counts as 0, nothing in common.
    Returns: a row for each method, attack, prompt, metric and `gap_ratios.OVER`: on
      each side the mean over the concepts, its 95% bootstrap interval, and each
      concept's ratio, of the mean over its seeds. Trajectories are cut to the steps
      that all concepts have. None for a side that has no concept with a ratio.
    """
    attacked = [cell for cell in cells if cell["attack"] != BEFORE]
    values = _trajectories(attacked, metrics)
    arms = dict.fromkeys(_key(cell) for cell in attacked)
    rows = []
    for method, attack, prompt, family in arms:
        if method == ORIGINAL:
            continue
        for metric in metrics:
            ratios = {
                side: _gaps(values, method, (attack, prompt, side, metric))
                for side in ATTACKED_SIDES
            }
            for over in gap_ratios.OVER:
                row = {"method": method, "attack": attack, "family": family}
                row |= {"prompt": prompt, "metric": metric, "over": over}
                rows.append(row | {s: _describe(r, over) for s, r in ratios.items()})
    return rows


def compare(
    rows: Rows, first: str, second: str, metric: str, over: str
) -> dict[str, Any]:
    """Returns how the gap ratios of two methods differ, paired by concept.

    Args: rows: of `summarize`, maybe of several benchmarks together. Attacks, prompts
      and concepts that only one method has are left out.
    Returns: of each side {"by_attack": {(attack, prompt): (mean of the first, mean of
      the second)}, "means": both over all attacks, "difference": second - first, "low",
      "high": its 95% bootstrap interval over concepts, "concepts": their names}; None
      for a side on which they share nothing.
    """
    result = {}
    for side in ATTACKED_SIDES:
        tables = [
            _by_attack(rows, name, metric, over, side) for name in (first, second)
        ]
        pairs = {}  # {(attack, prompt): {concept: (first, second)}}
        for attack in (attack for attack in tables[0] if attack in tables[1]):
            one, two = (table[attack] for table in tables)
            pairs[attack] = {c: (one[c], two[c]) for c in one if c in two}
        result[side] = _compare_side({a: p for a, p in pairs.items() if p})
    return result


def _by_attack(rows: Rows, method: str, metric: str, over: str, side: str) -> dict:
    """Returns {(attack, prompt): {concept: gap ratio}} of one method."""
    table: dict = {}
    for row in rows:
        if (row["method"], row["metric"], row["over"]) == (method, metric, over):
            ratios = row[side]["per_concept"] if row[side] else {}
            known = {c: ratio for c, ratio in ratios.items() if ratio is not None}
            table.setdefault((row["attack"], row["prompt"]), {}).update(known)
    return table


def _compare_side(pairs: dict) -> dict[str, Any] | None:
    if not pairs:
        return None
    by_concept: dict[str, list] = {}
    for ratios in pairs.values():
        for concept, pair in ratios.items():
            by_concept.setdefault(concept, []).append(pair)
    means = np.array([np.mean(both, axis=0) for both in by_concept.values()])
    changes = means[:, 1] - means[:, 0]
    low, high = gap_ratios.bootstrap(changes)
    return {
        "by_attack": {
            attack: tuple(np.mean(list(ratios.values()), axis=0).round(4).tolist())
            for attack, ratios in pairs.items()
        },
        "means": tuple(means.mean(axis=0).round(4).tolist()),
        "difference": round(float(changes.mean()), 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "concepts": sorted(by_concept),
    }


def _key(cell):
    return cell["method"], cell["attack"], cell["prompt"], cell["family"]


def _trajectories(cells, metrics):
    """{(attack, prompt, side, metric): {method: {concept: {step: value}}}}."""
    table: dict = {}
    for cell in cells:
        for metric in metrics:
            key = cell["attack"], cell["prompt"], cell["side"], metric
            by_concept = table.setdefault(key, {}).setdefault(cell["method"], {})
            steps = by_concept.setdefault(cell["concept"], {})
            for point in cell["points"]:
                if metric in point["values"]:
                    value = max(0.0, point["values"][metric])
                    steps.setdefault(point["step"], []).append(value)
    return table


def _gaps(table, method, key):
    """{concept: trajectory gaps} of what both the method and the original have."""
    arms = table.get(key, {})
    defended, original = arms.get(method, {}), arms.get(ORIGINAL, {})
    both = [concept for concept in original if concept in defended]
    if not both:
        return {}
    shared = set.intersection(
        *(set(arm[concept]) for arm in (defended, original) for concept in both)
    )
    if not shared:
        return {}

    def values(steps):
        return [float(np.mean(steps[step])) for step in sorted(shared)]

    return {
        c: gap_ratios.trajectory_gaps(values(original[c]), values(defended[c]))
        for c in both
    }


def _describe(by_concept, over):
    ratios = {concept: gaps[over] for concept, gaps in by_concept.items()}
    known = [ratio for ratio in ratios.values() if ratio is not None]
    if not known:
        return None
    low, high = gap_ratios.bootstrap(known)
    numbers = {"value": float(np.mean(known)), "low": low, "high": high}
    numbers = {name: round(x, 6) for name, x in numbers.items()}
    ratios = {c: None if r is None else round(r, 6) for c, r in ratios.items()}
    return numbers | {"per_concept": ratios}
