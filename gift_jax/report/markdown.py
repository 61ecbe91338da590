# SPDX-License-Identifier: Apache-2.0
"""The report's tables as Markdown."""

from collections.abc import Iterable, Sequence

from gift_jax.benchmark import summary
from gift_jax.benchmark.table import (
    HEADLINE,
    HEADLINE_NOTE,
    form,
    headline_rows,
    seconds,
)
from gift_jax.report import results, tables
from gift_jax.report.results import Run
from gift_jax.runtime import markdown as md

NOTE = """\
Similarity gap ratio against the original model, (M(original) - M(defended)) /
M(original). Harmful: 1 means that the attack reaches nothing, 0 that the defense
changed nothing. Benign: what an honest user loses, best near 0. In brackets the 95%
bootstrap interval over concepts. Bold: the best of a column (highest harmful, benign
nearest to 0). Worst case: the lowest harmful ratio over a family's learning
rates{prompts}, with the attack that reached it; the attacker picks what works."""


def markdown(runs: Sequence[Run], metric: str = "", over: str = "") -> str:
    """Returns every table of the runs; those of the metric and part given first."""
    parts = [part for run in runs for part in _of_run(run, metric, over)]
    return "\n\n".join(parts).rstrip() + "\n"


def comparison(runs: Sequence[Run], first: str, second: str, metric: str, over: str):
    """Returns the paired comparison of two methods as Markdown.

    The methods may be of different runs, as far as these share attacks and concepts.
    """
    rows = [row for run in runs for row in run.data["summary"]]
    sides = summary.compare(rows, first, second, metric, over)
    parts = [f"Gap ratios of {md.escape(metric)}, {md.escape(over)} of the trajectory"]
    for side, side_stats in sides.items():
        if side_stats is None:
            parts.append(f"{side}: the two methods share no attack and concept")
            continue
        rows = [
            (f"{attack} ({prompt})", form(one), form(two), form(two - one))
            for (attack, prompt), (one, two) in side_stats["by_attack"].items()
        ]
        one, two = side_stats["means"]
        interval = f"[{form(side_stats['low'])}, {form(side_stats['high'])}]"
        change = f"{form(side_stats['difference'])} {interval}"
        chance = "within chance" if side_stats["is_chance"] else "beyond chance"
        rows.append(("all attacks", form(one), form(two), md.Markdown(change)))
        count = side_stats["pairs"]
        if count < summary.FEWEST_PAIRS:
            chance += f": fewer than {summary.FEWEST_PAIRS} pairs cannot tell"
        pairs = f"{count} pair{'s' * (count > 1)} of concept and seed"
        parts.append(f"{side}, {pairs}: {second} - {first} = {change}, {chance}")
        heads = ("attack", first, second, "difference")
        parts.append(md.table(heads, rows, numbers=True))
    return "\n\n".join(parts) + "\n"


def _of_run(run: Run, metric: str, over: str) -> Iterable[str]:
    data = run.data
    yield f"# {md.escape(run.label)}"
    yield "\n".join("    " + line for line in data["command"].splitlines())
    if data["headline"]:
        yield "## At a glance"
        yield HEADLINE_NOTE
        yield md.table(HEADLINE, headline_rows(data))
    prompts = " and prompts" if len(results.prompts(data)) > 1 else ""
    yield NOTE.format(prompts=prompts)
    for name, reason in data["skipped"].items():
        yield f"Skipped: {md.escape(name)}: {md.escape(reason)}"
    with_gaps = {row["metric"] for row in data["summary"]}
    for name in _first(results.metrics(data), metric):
        higher = data["metrics"].get(name, {}).get("higher_means", "")
        note = f" (higher means {md.escape(higher)})" if higher else ""
        yield f"## {md.escape(name)}{note}"
        for part in _first(results.overs(data), over) if name in with_gaps else ():
            columns = tables.gap_columns(data, name, part)
            yield f"Gap ratio, {md.escape(part)} of the trajectory"
            yield _table(tables.defended(data), columns, grouped=True)
            yield f"Worst case, harmful, {md.escape(part)} of the trajectory"
            worst = tables.worst_columns(data, columns)
            yield _table(tables.defended(data), worst, several=bool(prompts))
        before = tables.before_columns(data, name)
        if before:
            yield "Before any attack"
            yield _table(results.methods(data), before)
    times = [(kind, name, f"{s:.3f}") for kind, name, s in seconds(data)]
    if times:
        yield "## Seconds per step (median)"
        yield md.table(("", "", "s"), times)
    yield "## Versions"
    yield md.table(("package", "version"), data["versions"].items())


def _table(
    methods: Sequence[str],
    columns: Sequence[tables.Column],
    *,
    grouped: bool = False,
    several: bool = False,
) -> str:
    """Returns a row a method. grouped: heads name the group. several: the prompt."""
    heads = [f"{c.group}, {c.head}" if grouped else c.head for c in columns]
    if several:
        heads = [f"{c.head} ({c.prompts[0] or 'any prompt'})" for c in columns]
    rows = [
        (name, *(_number(column.numbers[i]) for column in columns))
        for i, name in enumerate(methods)
    ]
    return md.table(("method", *heads), rows, numbers=True)


def _number(number: tables.Number | None) -> md.Markdown:
    if number is None:
        return md.Markdown("–")
    text = f"**{number.text}**" if number.best else number.text
    note = f"({md.escape(number.note)})" if number.note else ""
    return md.Markdown(" ".join(p for p in (text, number.spread, note) if p))


def _first(names: Iterable[str], chosen: str) -> list[str]:
    return sorted(names, key=lambda name: name != chosen)
