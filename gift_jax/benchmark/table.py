# SPDX-License-Identifier: Apache-2.0
"""Numbers and tables of a benchmark, as they are shown everywhere."""

import statistics
from typing import Any

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


def markdown(results: dict[str, Any]) -> str:
    """Returns results.md: shares recognized after each attack, and seconds a step.

    Args: results: what results.json holds.
    """
    cells, parts = results["cells"], []
    methods = tuple(dict.fromkeys(cell["method"] for cell in cells))
    for concept in dict.fromkeys(cell["concept"] for cell in cells):
        group = [cell for cell in cells if cell["concept"] == concept]
        counts = {cell["points"][-1]["num"] for cell in group}
        parts.append(f"{concept}: recognized, of {', '.join(map(str, counts))} each")
        rows: dict[str, dict[str, str]] = {}
        for cell in group:
            rows.setdefault(_row_label(cell), {})[cell["method"]] = recognized(cell)
        lines = [
            (label, *(row.get(m, "") for m in methods)) for label, row in rows.items()
        ]
        parts.append(md.table(("side, attack", *methods), lines))
    times = [(name, f"{s:.3f}") for _, name, s in seconds(results)]
    parts += ["Seconds per step", md.table(("", "s"), times)]
    return "\n\n".join(parts) + "\n"


def _row_label(cell: dict[str, Any]) -> str:
    prompt = f", by {cell['prompt']}" if cell["family"] else ""
    seed = f", seed {cell['seed']}" if cell["seed"] else ""
    return f"{cell['side']}, {cell['attack']}{prompt}{seed}"
