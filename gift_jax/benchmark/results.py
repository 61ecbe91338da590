# SPDX-License-Identifier: Apache-2.0
"""results.json, results.md and the image grids of a benchmark."""

import dataclasses
import json
import pathlib
from typing import Any

from absl import logging
from rich.console import Console

from gift_jax.benchmark import concepts, summary, table
from gift_jax.benchmark.matrix import Cell, Matrix
from gift_jax.benchmark.store import Store
from gift_jax.runtime import files
from gift_jax.sampling import grid

_SHOWN = 8  # images of a cell in the grids
_CELL_ONLY = ("id", "digests")  # stay in cells.jsonl


def publish(
    matrix: Matrix, workdir: pathlib.Path, results: Store, command: str
) -> pathlib.Path:
    """Writes results.json, results.md and the grids; returns the first's path.

    Args: results: with every cell done. command: the command line.
    """
    cfg = matrix.cfg
    cells = [_result(matrix, cell, results.cells[cell.id]) for cell in matrix.cells]
    metrics = tuple(matrix.fields.gap_metrics)
    # some metrics are of some sides only
    measured = {metric.get("metric") for metric in results.metrics.values()}
    skipped = {k: v for k, v in results.skipped.items() if k not in measured}
    data = {
        "name": cfg.name,
        "command": command,
        "config": _config(matrix),
        "versions": {k: ", ".join(v) for k, v in sorted(results.versions.items())},
        "metrics": results.metrics,
        "skipped": skipped,
        "summary": summary.summarize(cells, metrics),
        "headline": summary.headline(cells, metrics[0]) if metrics else [],
        "cells": cells,
    }
    path = workdir / "results.json"
    text = json.dumps(data, separators=(",", ":"), sort_keys=True)
    files.write(path, text + "\n")
    text = table.markdown(data)
    files.write(workdir / "results.md", text)
    for concept in matrix.concepts:
        for side in summary.SIDES:
            shown = [c for c in matrix.cells if (c.concept, c.side) == (concept, side)]
            name = f"{concept}_{side}.png".replace(" ", "_")
            _save_grid(matrix, workdir, shown, data, name)
    Console(width=120).print(text, soft_wrap=True, highlight=False, markup=False)
    return path


def _config(matrix: Matrix) -> dict[str, Any]:
    """Returns the config with only those definitions that were run."""
    config = json.loads(json.dumps(matrix.cfg.to_dict()))
    for kind, definitions in config["definitions"].items():
        names = getattr(matrix.fields, kind)
        config["definitions"][kind] = {
            name: value for name, value in definitions.items() if name in names
        }
    return config


def _result(matrix: Matrix, cell: Cell, entry: dict[str, Any]) -> dict[str, Any]:
    """Returns a cell as results.json has it."""
    kept = {name: value for name, value in entry.items() if name not in _CELL_ONLY}
    points = [
        point | {"sheet": str(cell.folder / f"{point['step']:06d}.png")}
        for point in entry["points"]
    ]
    return {
        **dataclasses.asdict(cell),
        "family": matrix.attack_family(cell.attack),
        "is_bound": cell.is_attacked and matrix.attacks[cell.attack].is_bound,
        **kept,
        "points": points,
    }


def _save_grid(
    matrix: Matrix, workdir: pathlib.Path, cells: list[Cell], data: dict, name: str
) -> None:
    """Writes a grid with a row for each attack and method of one concept and side.

    Cells without images here, of another machine, are left out.
    """
    by_key = {_key(result): result for result in data["cells"]}
    attacks = (summary.BEFORE, *matrix.fields.attacks)
    prompts = (*concepts.PROMPTS, concepts.LEARNED)
    rows, labels = [], []
    for cell in sorted(
        cells, key=lambda c: (attacks.index(c.attack), prompts.index(c.prompt))
    ):
        result = by_key[_key(dataclasses.asdict(cell))]
        point = result["points"][-1]
        if not (workdir / point["sheet"]).exists():
            continue
        rows.append(grid.read_sheet(workdir / point["sheet"], point["num"])[:_SHOWN])
        prompt = f" by {cell.prompt}" if cell.is_attacked else ""
        seed = f", seed {cell.seed}" if cell.seed else ""
        share = table.recognized(result)
        labels.append(f"{cell.attack}{prompt}: {cell.method}{seed} ({share})")
    if rows:
        grid.save_grid(rows, workdir / name, row_labels=labels)
        logging.info("images: %s", workdir / name)


def _key(cell: dict[str, Any]) -> tuple:
    return tuple(cell[field.name] for field in dataclasses.fields(Cell))
