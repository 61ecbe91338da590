# SPDX-License-Identifier: Apache-2.0
"""The page's tables as Markdown."""

import re
from collections.abc import Iterable, Sequence

from gift_jax.report import results, tables

NOTE = """\
Similarity gap ratio against the original model, (M(original) - M(defended)) /
M(original). Harmful: 1 means that the attack reaches nothing, 0 that the defence
changed nothing. Benign: what an honest user loses, best near 0. In brackets the 95%
bootstrap interval over concepts. Bold: the best of a column (highest harmful, benign
nearest to 0). Worst case: the lowest harmful ratio over a family's learning
rates{prompts}, with the attack that reached it; the attacker picks what works."""


def markdown(runs: Sequence[results.Run], metric: str = "", over: str = "") -> str:
    """Returns every table of the runs; those of the metric and part given first."""
    parts = [part for run in runs for part in _of_run(run, metric, over)]
    return "\n\n".join(parts).rstrip() + "\n"


def _of_run(run, metric: str, over: str) -> Iterable[str]:
    data = run.data
    yield f"# {escape(run.label)}"
    yield "\n".join("    " + line for line in data["command"].splitlines())
    prompts = " and prompts" if len(results.prompts(data)) > 1 else ""
    yield NOTE.format(prompts=prompts)
    for name, reason in data["skipped"].items():
        yield f"Skipped: {escape(name)}: {escape(reason)}"
    with_gaps = {row["metric"] for row in data["summary"]}
    for name in _first(results.metrics(data), metric):
        higher = data["metrics"].get(name, {}).get("higher", "")
        yield f"## {escape(name)}" + (f" (higher: {escape(higher)})" if higher else "")
        for part in _first(tables.overs(data), over) if name in with_gaps else ():
            table = tables.gap_table(data, name, part)
            yield f"Gap ratio, {escape(part)} of the trajectory"
            yield _gap_rows(data, table)
            yield f"Worst case, harmful, {escape(part)} of the trajectory"
            yield _worst_rows(data, table)
        before = tables.before_table(data, name)
        if before:
            yield "Before any attack"
            heads = [f"{side} ({prompt})" for side, prompt in before]
            yield _grid(heads, results.methods(data), list(before.values()))
    timed = tables.seconds(data)
    if timed:
        yield "## Seconds per step (median)"
        rows = [(what, whose, f"{t:.3f}") for what, whose, t in timed]
        yield _lines([("", "", "s"), *rows])
    yield "## Versions"
    yield _lines([("package", "version"), *data["versions"].items()])


def _gap_rows(data, table: tables.Table) -> str:
    heads = [f"{results.match_label(data, m)}, {side}" for m, side in table.columns]
    return _grid(heads, tables.defended(data), list(table.columns.values()))


def _worst_rows(data, table: tables.Table) -> str:
    several = len(results.prompts(data)) > 1
    heads = [
        f"{family} ({prompt or 'any prompt'})" if several else family
        for prompt, family in table.worst
    ]
    return _grid(heads, tables.defended(data), list(table.worst.values()))


def _grid(heads, names, columns) -> str:
    rows = [("method", *heads)]
    rows += [(n, *(_told(c[i]) for c in columns)) for i, n in enumerate(names)]
    return _lines(rows, numbers=True)


class _Told(str):
    """Text that is Markdown already."""


def _told(number: tables.Number | None) -> str:
    if number is None:
        return "–"
    text = f"**{number.text}**" if number.best else number.text
    at = f"({number.at})" if number.at else ""
    return _Told(" ".join(p for p in (text, number.spread, escape(at)) if p))


def _lines(rows, numbers: bool = False) -> str:
    head, *body = [[c if isinstance(c, _Told) else escape(c) for c in r] for r in rows]
    rule = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def escape(text: str) -> str:
    """Returns text that Markdown shows as it is, on one line."""
    text = re.sub(r"([\\`*|<>&#~\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", str(text))
    return " ".join(text.split())


def _first(names, wanted):
    return sorted(names, key=lambda name: name != wanted)
