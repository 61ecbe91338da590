# SPDX-License-Identifier: Apache-2.0
"""A metric after each attack step: means over concepts with bootstrap bands."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from gift_jax.benchmark import gap_ratios, summary
from gift_jax.report import results


class Point(NamedTuple):
    """A metric after some attack steps; low and high: of the mean over n concepts."""

    step: int
    value: float
    low: float
    high: float
    n: int


class Curve(NamedTuple):
    """One line of a plot. concept: "" for the mean over all of them."""

    match: results.Match
    side: str
    method: str
    concept: str
    points: list[Point]


def curves(data: dict[str, Any], metric: str) -> list[Curve]:
    """Returns the metric against attack steps, of each attack, side and method.

    Seeds are averaged within a concept. The mean over concepts has the steps that all
    of its concepts have. Step 0 is what was drawn before the attack, from the same
    prompt, where that was measured.
    """
    table, lines = _table(data, metric), []
    for match in results.matches(data):
        before = match._replace(family="", attack=summary.BEFORE)
        for side in summary.ATTACKED_SIDES:
            for method in results.methods(data):
                attacked = table.get((match, side, method), {})
                start = table.get((before, side, method), {})
                joined = {c: start.get(c, {}) | attacked[c] for c in attacked}
                lines += _curves_of(joined, match, side, method)
    return [curve for curve in lines if curve.points]


def before(data: dict[str, Any], metric: str) -> list[Curve]:
    """Returns the metric before any attack, likewise: curves of one point."""
    lines = []
    for (match, side, method), by_concept in _table(data, metric).items():
        if match.attack == summary.BEFORE:
            lines += _curves_of(by_concept, match, side, method)
    return [curve for curve in lines if curve.points]


def _table(data, metric):
    """{(match, side, method): {concept: {step: mean over seeds}}}."""
    table: dict = {}
    for cell in data["cells"]:
        family = "" if cell["attack"] == summary.BEFORE else cell["family"]
        match = results.Match(family, cell["attack"], cell["prompt"])
        key = match, cell["side"], cell["method"]
        for point in cell["points"]:
            value = point["values"].get(metric)
            if value is not None:
                steps = table.setdefault(key, {}).setdefault(cell["concept"], {})
                steps.setdefault(point["step"], []).append(value)
    return {
        key: {
            concept: {step: float(np.mean(values)) for step, values in steps.items()}
            for concept, steps in by_concept.items()
        }
        for key, by_concept in table.items()
    }


def _curves_of(by_concept, match, side, method) -> Iterator[Curve]:
    if not by_concept:
        return
    shared = set.intersection(*(set(steps) for steps in by_concept.values()))
    points = []
    for step in sorted(shared):
        values = [steps[step] for steps in by_concept.values()]
        low, high = gap_ratios.bootstrap(values, num=2000)
        points.append(Point(step, float(np.mean(values)), low, high, len(values)))
    yield Curve(match, side, method, "", points)
    for concept, steps in by_concept.items():
        points = [Point(s, v, v, v, 1) for s, v in sorted(steps.items())]
        yield Curve(match, side, method, concept, points)
