# SPDX-License-Identifier: Apache-2.0
"""Numbers and tables of a benchmark, as they are shown everywhere."""

import statistics
from typing import Any

from gift_jax.benchmark import summary
from gift_jax.runtime import markdown as md

RECOGNIZED = "classifier_accuracy"  # the share that the classifier recognizes


def form(value: float) -> str:
    """Returns a number as it is shown: two decimals, fewer for large ones."""
    places = 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    text = f"{value:.{places}f}"
    return text.lstrip("-") if not float(text) else text


def recognized(cell: dict[str, Any]) -> str:
    """Returns the share recognized at a cell's last point, such as "96%", or "-"."""
    values = cell["points"][-1]["values"]
    return f"{values[RECOGNIZED]:.0%}" if RECOGNIZED in values else "-"


def seconds(results: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Returns (defense or attack, its name, median seconds a step)."""
    rows = []
    for kind, key, named_by in (
        ("defense", "defense_step_s", "method"),
        ("attack", "step_s", "attack"),
    ):
        times: dict[str, list[float]] = {}
        for cell in results["cells"]:
            if cell.get(key) is not None:
                times.setdefault(cell[named_by], []).append(cell[key])
        rows += [(kind, name, statistics.median(t)) for name, t in times.items()]
    return rows


HEADLINE = (
    *("method", "worst case", "by", "mean", "harmful gap", "worst gap", "benign gap"),
    *("retained", "fidelity"),
)
HEADLINE_NOTE = """\
Worst case: the most that any attack reaches, over attacks, prompts, rates, concepts,
seeds and steps; the attacker picks what works. Mean: of the same, over all of them.
Gaps: what the defense takes from attackers (1: everything) and from honest users (0:
nothing), of each attack's peak, with the 95% interval over concepts and seeds; worst
gap: of one attack, mean over concepts. Retained: known safe things. Fidelity: distance
to the original's samples of these from the same noise (0: the same). Ignorance bound:
what the same attacks reach on the original model with a concept that it never saw;
perfect forgetting gives that, no more."""
SPREADS_NOTE = """\
How far apart the final values are: of defenses, as a standard deviation (an attack that
sets them apart says most); of seeds of one defense and concept, largest minus smallest,
mean over them."""


def headline_rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Returns the rows of `HEADLINE`: one for the ignorance bound and each method."""
    rows = []
    for row in results["headline"]:
        worst, distance = row["worst"], summary.fidelity(row)
        gap = row.get("worst_gap")
        rows.append(
            (
                row["method"],
                _share(worst and worst["value"], row["metric"]),
                _where(worst),
                _share(row["mean"], row["metric"]),
                _interval(row.get("harmful_gap")),
                f"{form(gap['value'])}, {gap['attack']} ({gap['prompt']})"
                if gap
                else "",
                _interval(row.get("benign_gap")),
                _share(row.get("retained"), row["metric"]),
                f"{form(distance[1])} ({distance[0]})" if distance else "",
            )
        )
    return rows


def _share(value: float | None, metric: str) -> str:
    if value is None:
        return ""
    return f"{value:.0%}" if metric == RECOGNIZED else form(value)


def _where(worst: dict[str, Any] | None) -> str:
    if not worst:
        return ""
    seed = f", seed {worst['seed']}" if worst["seed"] else ""
    return (
        f"{worst['attack']} by {worst['prompt']} on {worst['concept']}{seed}, "
        f"step {worst['step']}"
    )


def _interval(gap: dict[str, float] | None) -> str:
    if not gap:
        return ""
    return f"{form(gap['value'])} ({form(gap['low'])} to {form(gap['high'])})"


def markdown(results: dict[str, Any]) -> str:
    """Returns results.md: the headline, shares recognized, spreads, seconds a step.

    Args: results: what results.json holds.
    """
    cells, parts = results["cells"], []
    if results["headline"]:
        parts += [HEADLINE_NOTE, md.table(HEADLINE, headline_rows(results))]
    methods = tuple(dict.fromkeys(cell["method"] for cell in cells))
    for concept in dict.fromkeys(cell["concept"] for cell in cells):
        group = [cell for cell in cells if cell["concept"] == concept]
        counts = sorted({cell["points"][-1]["num"] for cell in group})
        numbers = ", ".join(map(str, counts))
        parts.append(f"{concept}: recognized at the end, of {numbers} samples")
        rows: dict[str, dict[str, str]] = {}
        for cell in group:
            rows.setdefault(_row_label(cell), {})[cell["method"]] = recognized(cell)
        lines = [
            (label, *(row.get(m, "") for m in methods)) for label, row in rows.items()
        ]
        parts.append(md.table(("side, attack", *methods), lines))
    spreads = summary.attack_spreads(cells, RECOGNIZED)
    lines = [
        (f"{row['side']}, {row['attack']} by {row['prompt']}", *numbers)
        for row in spreads
        if any(numbers := [_optional(row[name]) for name in ("defenses", "seeds")])
    ]
    if lines:
        parts += [SPREADS_NOTE, md.table(("attack", "defenses", "seeds"), lines)]
    times = [(name, f"{s:.3f}") for _, name, s in seconds(results)]
    parts += ["Seconds per step", md.table(("", "s"), times)]
    per_cell = [cell["seconds"] for cell in cells]
    total = f"{sum(per_cell) / 3600:.1f} h in all"
    parts.append(f"Seconds per cell: {statistics.mean(per_cell):.1f} (mean), {total}")
    return "\n\n".join(parts) + "\n"


def _optional(value: float | None) -> str:
    return "" if value is None else form(value)


def _row_label(cell: dict[str, Any]) -> str:
    prompt = f", by {cell['prompt']}" if cell["family"] else ""
    seed = f", seed {cell['seed']}" if cell["seed"] else ""
    return f"{cell['side']}, {cell['attack']}{prompt}{seed}"
