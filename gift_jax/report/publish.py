# SPDX-License-Identifier: Apache-2.0
"""What a benchmark's folder is reduced to, to be kept in a repository: under 1 MB.

summary.json has the keys of results.json, and the report reads it as well: the gap
ratios with their intervals, and of each cell the values of its metrics, rounded. It
lacks the values of single samples, their sheets, and the models.
"""

import json
import pathlib
import tempfile
from typing import Any

from gift_jax.benchmark import summary
from gift_jax.report import markdown, page, results
from gift_jax.sampling import grid

LIMIT = 1e6  # bytes of all files together
_CELL = ("concept", "method", "side", "attack", "prompt", "family", "seed")
_CELL += ("is_bound",)
_TIMES = ("seconds", "step_s", "defense_step_s")
_SHOWN = 2  # samples of each cell in the grid


def publish(
    run: results.Run,
    out: pathlib.Path,
    *,
    metric: str = "",
    over: str = "",
    concept: str = "",
) -> list[pathlib.Path]:
    """Writes the summary, config, tables, plots and one grid; returns their paths.

    Everything is written aside and renamed at the end.

    Args: metric, over: of the plots. concept: of the grid, "" for the first; there is
      a grid only if the run's folder has its sheets.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".publish-") as name:
        aside = pathlib.Path(name)
        _write_json(aside / "summary.json", _summary(run.data))
        _write_json(aside / "config.json", run.data["config"], indent=1)
        text = markdown.markdown([run], metric, over)
        (aside / "table.md").write_text(text, encoding="utf-8")
        page.write_plots(run.data, aside, "", metric, over)
        concept = concept or results.concepts(run.data)[0]
        _save_grid(run, concept, aside / "grid.webp")
        return sorted(file.replace(out / file.name) for file in aside.iterdir())


def _write_json(path: pathlib.Path, value: Any, indent: int | None = None) -> None:
    separators = None if indent else (",", ":")
    text = json.dumps(value, indent=indent, separators=separators, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def _summary(data: dict[str, Any]) -> dict[str, Any]:
    """Returns results.json without what only its folder needs."""
    return {
        **{name: data[name] for name in ("name", "command", "versions", "summary")},
        **{name: data[name] for name in ("metrics", "skipped", "headline")},
        "config": {},  # in config.json
        "cells": [_cell(cell) for cell in data["cells"]],
    }


def _cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Returns a cell whose points are columns; `results.load` makes points of them."""
    points = cell["points"]
    names = dict.fromkeys(name for point in points for name in point["values"])
    times = {k: round(cell[k], 3) for k in _TIMES if cell.get(k) is not None}
    return {
        **{name: cell[name] for name in _CELL if name in cell},
        **times,
        "steps": [point["step"] for point in points],
        "nums": [point["num"] for point in points],
        "values": {
            name: [_rounded(p["values"].get(name)) for p in points] for name in names
        },
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _save_grid(run: results.Run, concept: str, path: pathlib.Path) -> None:
    """Writes a concept's harmful samples: a row for each method that has all of them.

    The columns are the first samples before the attack, and after each attack.
    """
    cases: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in run.data["cells"]:
        if (cell["concept"], cell["side"]) == (concept, summary.HARMFUL):
            case = cases.setdefault((cell["attack"], cell["prompt"]), {})
            case.setdefault(cell["method"], cell)
    rows = {}
    for method in results.methods(run.data):
        samples = [_samples(run.folder, case.get(method)) for case in cases.values()]
        if all(samples):
            rows[method] = [image for images in samples for image in images]
    heads = []
    for attack, prompt in cases:
        label = attack if attack == summary.BEFORE else f"{attack} ({prompt})"
        heads += [label, *[""] * (_SHOWN - 1)]
    if rows:
        labels = list(rows)
        grid.save_grid(
            list(rows.values()), path, row_labels=labels, column_labels=heads, cell=64
        )


def _samples(folder: pathlib.Path, cell) -> list:
    """Returns a cell's first samples; none without its sheet or with too few."""
    if cell is None or not cell["points"]:
        return []
    point = cell["points"][-1]
    path = folder / point["sheet"] if point.get("sheet") else None
    if path is None or not path.is_file() or point["num"] < _SHOWN:
        return []
    return list(grid.read_sheet(path, point["num"])[:_SHOWN])
