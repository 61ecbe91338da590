# SPDX-License-Identifier: Apache-2.0
"""From a benchmark's cells to what each defence takes from each attack."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gift_jax.benchmark import gap_ratios

ORIGINAL, BEFORE = "original", "before"  # no defence, no attack
HARMFUL, BENIGN = SIDES = ("harmful", "benign")
Rows = list[dict[str, Any]]


def summarize(cells: Iterable[dict[str, Any]], metrics: Sequence[str]) -> Rows:
    """Returns similarity gap ratios against the model without a defence.

    Args: cells: as results.json holds them. metrics: names of similarities (higher is
      more alike); below 0 counts as 0, nothing in common.
    Returns: a row for each method, attack, prompt, metric and `gaps.OVER`: on each side
      the mean over the concepts, its 95% bootstrap interval, and each concept's ratio,
      of the mean over its seeds. Trajectories are cut to the steps that all concepts
      have. None for a side that has no concept with a ratio.
    """
    attacked = [cell for cell in cells if cell["attack"] != BEFORE]
    table = _trajectories(attacked, metrics)
    known = {(c["method"], c["attack"], c["prompt"], c["family"]) for c in attacked}
    order = {_key(cell): i for i, cell in reversed(list(enumerate(attacked)))}
    rows = []
    for method, attack, prompt, family in sorted(known, key=order.get):
        if method == ORIGINAL:
            continue
        for metric in metrics:
            sides = {
                side: _gaps(table, method, (attack, prompt, side, metric))
                for side in SIDES
            }
            for over in gap_ratios.OVER:
                told = {side: _describe(sides[side], over) for side in SIDES}
                head = {"method": method, "attack": attack, "family": family}
                head |= {"prompt": prompt, "metric": metric, "over": over}
                rows.append(head | told)
    return rows


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
    mine, original = arms.get(method, {}), arms.get(ORIGINAL, {})
    both = [concept for concept in original if concept in mine]
    if not both:
        return {}
    shared = set.intersection(
        *(set(steps) for arm in (mine, original) for steps in (arm[c] for c in both))
    )
    if not shared:
        return {}

    def values(steps):
        return [float(np.mean(steps[step])) for step in sorted(shared)]

    return {
        c: gap_ratios.trajectory_gaps(values(original[c]), values(mine[c]))
        for c in both
    }


def _describe(by_concept, over):
    found = {concept: ratios[over] for concept, ratios in by_concept.items()}
    known = [ratio for ratio in found.values() if ratio is not None]
    if not known:
        return None
    low, high = gap_ratios.bootstrap(known)
    numbers = {"value": float(np.mean(known)), "low": low, "high": high}
    return {name: round(x, 6) for name, x in numbers.items()} | {"per_concept": found}
