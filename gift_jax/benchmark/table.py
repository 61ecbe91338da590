# SPDX-License-Identifier: Apache-2.0
"""What was recognised in each cell of a benchmark, as Markdown tables."""

from typing import Any

from gift_jax.report import tables


def markdown(results: dict[str, Any]) -> str:
    """Returns the tables: what was recognised after each attack, and seconds a step.

    Args: results: as results.json holds them.
    """
    cells, lines = results["cells"], []
    methods = tuple(dict.fromkeys(cell["method"] for cell in cells))
    for concept in dict.fromkeys(cell["concept"] for cell in cells):
        mine = [cell for cell in cells if cell["concept"] == concept]
        counts = {cell["points"][-1]["num"] for cell in mine}
        lines += ["", f"{concept}: recognised, of {', '.join(map(str, counts))} each"]
        lines += ["", *_head("side, attack", *methods)]
        for key in dict.fromkeys(_row_key(cell) for cell in mine):
            by_method = {c["method"]: c for c in mine if _row_key(c) == key}
            row = [by_method.get(method) for method in methods]
            lines.append(
                _row(", ".join(key), *(format_cell(c) if c else "" for c in row))
            )
    lines += ["", "Seconds per step", "", *_head("", "s")]
    lines += [_row(name, f"{s:.3f}") for _, name, s in tables.seconds(results)]
    return "\n".join(lines).strip() + "\n"


def format_cell(cell: dict[str, Any]) -> str:
    """Returns what the last look at a cell recognised, such as "96%"."""
    values = cell["points"][-1]["values"]
    accuracy = values.get("classifier_accuracy")
    return "-" if accuracy is None else f"{accuracy:.0%}"


def _row_key(cell: dict[str, Any]) -> tuple[str, ...]:
    key = cell["side"], cell["attack"]
    if cell["family"]:
        key += (f"by {cell['prompt']}",)
    return (*key, f"seed {cell['seed']}") if cell["seed"] else key


def _head(*names: str) -> list[str]:
    return [_row(*names), _row(*["---"] * len(names))]


def _row(*values: str) -> str:
    return "| " + " | ".join(values) + " |"
