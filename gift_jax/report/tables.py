# SPDX-License-Identifier: Apache-2.0
"""The numbers of the tables, the same for the page and for Markdown."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from gift_jax.benchmark import gap_ratios, summary
from gift_jax.report import curves, results

ANY = "any attack"  # the worst case over all families


@dataclasses.dataclass(frozen=True)
class Number:
    """One cell of a table.

    Attributes: low, high: its 95% interval. known: how many concepts it is the mean of.
      asked: how many there are. at: the attack, where the number is the worst of some.
    """

    value: float
    low: float | None = None
    high: float | None = None
    known: int = 1
    asked: int = 1
    at: str = ""
    best: bool = False

    @property
    def text(self) -> str:
        """The number as it is shown everywhere."""
        return form(self.value)

    @property
    def spread(self) -> str:
        """Its interval, and of how many concepts, as it is shown everywhere."""
        few = f"{self.known} of {self.asked} concepts"
        if self.known == 1 or self.low is None or self.high is None:
            return few if self.asked > 1 else ""
        both = f"[{form(self.low)}, {form(self.high)}]"
        return both if self.known == self.asked else f"{both} {few}"

    def as_json(self) -> dict[str, Any]:
        """Returns what the page needs; keys that say nothing are left out."""
        shown: dict[str, Any] = {"value": self.value, "text": self.text}
        if self.known > 1:
            shown |= {"low": self.low, "high": self.high}
        said = {"spread": self.spread, "at": self.at, "best": self.best}
        return shown | {key: value for key, value in said.items() if value}


Numbers = list[Number | None]


@dataclasses.dataclass(frozen=True)
class Table:
    """Gap ratios of one metric, over one part of the trajectory, of some concepts.

    Attributes: columns: {(match, side): a number for each method, the original left
      out}. worst: {(prompt or "", family or `ANY`): likewise}, the lowest on the
      harmful side.
    """

    columns: dict[tuple[results.Match, str], Numbers]
    worst: dict[tuple[str, str], Numbers]


def form(value: float) -> str:
    """Returns a number as it is shown: two decimals, fewer for large ones."""
    places = 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    text = f"{value:.{places}f}"
    return text.lstrip("-") if not float(text) else text


def defended(data) -> list[str]:
    """Returns the methods that have gap ratios, in order."""
    return [name for name in results.methods(data) if name != summary.ORIGINAL]


def gap_table(data, metric: str, over: str, concept: str = "") -> Table:
    """Returns the gap ratios; of one concept, or "" for the mean over all."""
    rows = {
        (row["method"], results.Match(row["family"], row["attack"], row["prompt"])): row
        for row in data["summary"]
        if (row["metric"], row["over"]) == (metric, over)
    }
    columns = {}
    for match in results.matches(data):
        for side in summary.SIDES:
            found = [rows.get((method, match)) for method in defended(data)]
            numbers = [_number(row and row[side], concept) for row in found]
            columns[match, side] = _mark_best(numbers, side)
    return Table(columns, _worst_cases(data, columns))


def _number(side: dict[str, Any] | None, concept: str) -> Number | None:
    if side is None:
        return None
    ratios = side["per_concept"]
    if concept:
        value = ratios.get(concept)
        return None if value is None else Number(value)
    if side["value"] is None:
        return None
    known = sum(ratio is not None for ratio in ratios.values())
    return Number(side["value"], side["low"], side["high"], known, len(ratios))


def _mark_best(numbers: Numbers, side: str) -> Numbers:
    """Marks the best of at least two, and all that are shown as the same number."""
    known = [number.value for number in numbers if number is not None]
    if len(known) < 2:
        return numbers
    best = max(known) if side == summary.HARMFUL else min(known, key=abs)

    def is_best(value):
        pair = (value, best) if side == summary.HARMFUL else (abs(value), abs(best))
        return form(pair[0]) == form(pair[1])

    return [n and dataclasses.replace(n, best=is_best(n.value)) for n in numbers]


def _worst_cases(data, columns):
    prompts, ours = results.prompts(data), results.matches(data)
    families = list(dict.fromkeys(match.family for match in ours))
    worst = {}
    for prompt in ("", *(prompts if len(prompts) > 1 else ())):
        for family in (*families, *((ANY,) if len(families) > 1 else ())):
            fitting = [m for m in ours if family in (ANY, m.family)]
            fitting = [m for m in fitting if prompt in ("", m.prompt)]
            numbers = _lowest(data, columns, fitting)
            if fitting:
                worst[prompt, family] = _mark_best(numbers, summary.HARMFUL)
    return worst


def _lowest(data, columns, fitting: Sequence[results.Match]) -> Numbers:
    lowest: Numbers = []
    for i in range(len(defended(data))):
        found = [(columns[match, summary.HARMFUL][i], match) for match in fitting]
        found = [(number, match) for number, match in found if number is not None]
        if not found:
            lowest.append(None)
            continue
        number, match = min(found, key=lambda pair: pair[0].value)
        at = results.match_label(data, match) if len(fitting) > 1 else ""
        if len(found) < len(fitting):
            at += f", {len(found)} of {len(fitting)} attacks"
        lowest.append(dataclasses.replace(number, at=at, best=False))
    return lowest


def before_table(data, metric: str, concept: str = "") -> dict[Any, Numbers]:
    """Returns {(side, prompt): a number for each method}: a metric with no attack."""
    methods, columns = results.methods(data), {}
    asked = len(results.concepts(data))
    for curve in curves.before(data, metric):
        if curve.concept == concept:
            numbers = columns.setdefault(
                (curve.side, curve.match.prompt), [None] * len(methods)
            )
            p = curve.points[0]
            number = Number(p.value, p.low, p.high, p.n, 1 if concept else asked)
            numbers[methods.index(curve.method)] = number
    return dict(sorted(columns.items(), key=lambda item: _side_order(item[0][0])))


def _side_order(side: str) -> int:
    order = ("kept", *summary.SIDES)  # what should be untouched first
    return order.index(side) if side in results.SIDES else len(order)


def seconds(data) -> list[tuple[str, str, float]]:
    """Returns (what, whose, median seconds a step) of defences and attacks."""
    found = []
    for what, key, who in (
        ("defence", "defence_step_s", "method"),
        ("attack", "step_s", "attack"),
    ):
        times: dict[str, list[float]] = {}
        for cell in data["cells"]:
            if cell.get(key) is not None:
                times.setdefault(cell[who], []).append(cell[key])
        found += [(what, name, statistics.median(t)) for name, t in times.items()]
    return found


def overs(data) -> list[str]:
    """Returns the parts of a trajectory that there are gap ratios over, in order."""
    found = dict.fromkeys(row["over"] for row in data["summary"])
    return sorted(
        found, key=lambda o: gap_ratios.OVER.index(o) if o in gap_ratios.OVER else 9
    )
