# SPDX-License-Identifier: Apache-2.0
"""The numbers of the tables, for the page and for Markdown alike."""

import dataclasses
from collections.abc import Sequence

from gift_jax.benchmark import summary
from gift_jax.benchmark.table import form
from gift_jax.report import results, trajectories

ANY = "any attack"  # the worst case over all families
WORST = "worst case, harmful"  # the group of such columns


@dataclasses.dataclass(frozen=True)
class Number:
    """One cell of a table.

    Attributes: low, high: its 95% interval. count: how many concepts it is the mean of.
      total: how many there are. note: which attack, where it is the worst of several.
      best: the best of its column.
    """

    value: float
    low: float | None = None
    high: float | None = None
    count: int = 1
    total: int = 1
    note: str = ""
    best: bool = False

    @property
    def text(self) -> str:
        """The number as it is shown everywhere."""
        return form(self.value)

    @property
    def spread(self) -> str:
        """Its interval, and of how many concepts, as it is shown everywhere."""
        few = f"{self.count} of {self.total} concepts"
        if self.count == 1 or self.low is None or self.high is None:
            return few if self.total > 1 else ""
        interval = f"[{form(self.low)}, {form(self.high)}]"
        return interval if self.count == self.total else f"{interval} {few}"


Numbers = list[Number | None]


@dataclasses.dataclass(frozen=True)
class Column:
    """A number for each method.

    Attributes: group, head: its headings. attacks, prompts: what it is about; an empty
      prompt is all of them together.
    """

    group: str
    head: str
    numbers: Numbers
    attacks: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()


def defended(data) -> list[str]:
    """Returns the methods that have gap ratios, in order."""
    return [name for name in results.methods(data) if name != summary.ORIGINAL]


def gap_columns(data, metric: str, over: str, concept: str = "") -> list[Column]:
    """Returns two columns an attack, harmful and benign, of the `defended` methods.

    Args: concept: "" for the mean over all.
    """
    rows = {
        (row["method"], results.Match(row["family"], row["attack"], row["prompt"])): row
        for row in data["summary"]
        if (row["metric"], row["over"]) == (metric, over)
    }
    columns = []
    for match in results.matches(data):
        label = results.match_label(data, match)
        for side in summary.ATTACKED_SIDES:
            chosen = [rows.get((method, match)) for method in defended(data)]
            numbers = [_number(row and row[side], concept) for row in chosen]
            numbers = _mark_best(numbers, side)
            attacks, prompts = (match.attack,), (match.prompt,)
            columns.append(Column(label, side, numbers, attacks, prompts))
    return columns


def worst_columns(data, columns: Sequence[Column]) -> list[Column]:
    """Returns the lowest harmful ratio of each family of attacks, and of all.

    Args: columns: of `gap_columns`.
    """
    prompts, matches = results.prompts(data), results.matches(data)
    bounds = results.bounds(data)
    families = list(
        dict.fromkeys(match.family for match in matches if match.attack not in bounds)
    )
    harmful = [column for column in columns if column.head == summary.HARMFUL]
    pairs = zip(matches, harmful, strict=True)
    by_match = {match: c for match, c in pairs if match.attack not in bounds}
    worst = []
    for prompt in ("", *(prompts if len(prompts) > 1 else ())):
        for family in (*families, *((ANY,) if len(families) > 1 else ())):
            chosen = [
                column
                for match, column in by_match.items()
                if family in (ANY, match.family) and prompt in ("", match.prompt)
            ]
            if chosen:
                numbers = _mark_best(_lowest(chosen), summary.HARMFUL)
                attacks = () if family == ANY else tuple(c.attacks[0] for c in chosen)
                worst.append(Column(WORST, family, numbers, attacks, (prompt,)))
    return worst


def before_columns(data, metric: str, concept: str = "") -> list[Column]:
    """Returns a metric without any attack: a column a side, of all methods."""
    methods, total = results.methods(data), len(results.concepts(data))
    columns: dict[tuple[str, str], Numbers] = {}
    for curve in trajectories.before(data, metric):
        if curve.concept == concept:
            place = curve.side, curve.match.prompt
            numbers = columns.setdefault(place, [None] * len(methods))
            p = curve.points[0]
            number = Number(p.value, p.low, p.high, p.n, 1 if concept else total)
            numbers[methods.index(curve.method)] = number
    several = len({prompt for _, prompt in columns}) > 1
    order = (summary.RETAINED, *summary.ATTACKED_SIDES)  # what should stay as it was
    return [
        Column(metric, f"{side} ({prompt})" if several else side, numbers)
        for (side, prompt), numbers in sorted(
            columns.items(), key=lambda item: order.index(item[0][0])
        )
    ]


def _number(side, concept: str) -> Number | None:
    if side is None:
        return None
    ratios = side["per_concept"]
    if concept:
        value = ratios.get(concept)
        return None if value is None else Number(value)
    if side["value"] is None:
        return None
    count = sum(ratio is not None for ratio in ratios.values())
    return Number(side["value"], side["low"], side["high"], count, len(ratios))


def _mark_best(numbers: Numbers, side: str) -> Numbers:
    """Marks the best of at least two, and all that are shown as the same number."""
    values = [number.value for number in numbers if number is not None]
    if len(values) < 2:
        return numbers
    best = max(values) if side == summary.HARMFUL else min(values, key=abs)

    def is_best(value):
        pair = (value, best) if side == summary.HARMFUL else (abs(value), abs(best))
        return form(pair[0]) == form(pair[1])

    return [n and dataclasses.replace(n, best=is_best(n.value)) for n in numbers]


def _lowest(columns: Sequence[Column]) -> Numbers:
    lowest: Numbers = []
    for numbers in zip(*(column.numbers for column in columns), strict=True):
        known = [
            (number, column.group)
            for number, column in zip(numbers, columns, strict=True)
            if number is not None
        ]
        if not known:
            lowest.append(None)
            continue
        number, attack = min(known, key=lambda pair: pair[0].value)
        note = attack if len(columns) > 1 else ""
        if len(known) < len(columns):
            note += f", {len(known)} of {len(columns)} attacks"
        lowest.append(dataclasses.replace(number, note=note, best=False))
    return lowest
