# SPDX-License-Identifier: Apache-2.0
"""results.json, results.md and the image grids of a finished benchmark."""

import json
import pathlib
import subprocess
from typing import Any

from absl import logging
from ml_collections import ConfigDict
from rich.console import Console

import gift_jax
from gift_jax.benchmark import concepts, summary, table
from gift_jax.benchmark.matrix import Cell
from gift_jax.runtime import files
from gift_jax.runtime.versions import versions
from gift_jax.sampling import grid

_SHOWN = 8  # images of a cell in the grids
_CELL_ONLY = ("config", "versions", "metrics", "skipped")  # stay in cell.json
_POINT_ONLY = ("samples", "labels")

Results = dict[Cell, dict[str, Any]]


def publish(
    cfg: ConfigDict, workdir: pathlib.Path, by_cell: Results, command: str
) -> pathlib.Path:
    """Writes results.json, results.md and the grids; returns the first's path.

    The values of single samples, and each cell's config, stay in its cell.json.
    """
    merged = {name: {} for name in ("metrics", "skipped")}
    for result in by_cell.values():
        for name, parts in merged.items():
            parts |= result[name]
    cells = [_light(result) for result in by_cell.values()]
    results = {
        "name": cfg.name,
        "command": command,
        "config": json.loads(json.dumps(cfg.to_dict())),
        "versions": _collect_versions(by_cell.values()),
        **merged,
        "summary": summary.summarize(cells, tuple(cfg.gap_metrics)),
        "cells": cells,
    }
    path = workdir / "results.json"
    text = json.dumps(results, separators=(",", ":"), sort_keys=True)
    files.write(path, text + "\n")
    text = table.markdown(results)
    files.write(workdir / "results.md", text)
    for concept in dict.fromkeys(cell.concept for cell in by_cell):
        for side in summary.SIDES:
            side_results = {
                cell: result
                for cell, result in by_cell.items()
                if (cell.concept, cell.side) == (concept, side)
            }
            _save_grid(
                cfg, workdir, side_results, f"{concept}_{side}.png".replace(" ", "_")
            )
    Console(width=120).print(text, soft_wrap=True, highlight=False, markup=False)
    return path


def versions_and_commit() -> dict[str, str]:
    """Returns the versions of the libraries and, in a clone, this package's commit."""
    root = pathlib.Path(gift_jax.__file__).parents[1]
    if not (root / ".git").exists():
        return versions()
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return versions()
    return versions() | {"commit": done.stdout.strip()}


def _collect_versions(cells) -> dict[str, str]:
    """Returns the versions and devices of all cells: a long run may have several."""
    seen: dict[str, set[str]] = {}
    for cell in cells:
        for name, value in (cell["versions"] | {"device": cell["device"]}).items():
            seen.setdefault(name, set()).add(value)
    return {name: ", ".join(sorted(values)) for name, values in seen.items()}


def _light(cell: dict[str, Any]) -> dict[str, Any]:
    """Returns a cell as results.json has it."""
    points = [
        {name: value for name, value in point.items() if name not in _POINT_ONLY}
        for point in cell["points"]
    ]
    kept = {name: value for name, value in cell.items() if name not in _CELL_ONLY}
    return kept | {"points": points}


def _save_grid(cfg, workdir: pathlib.Path, by_cell: Results, name: str) -> None:
    """Writes a grid with a row for each attack and method of one concept and side."""
    attacks = (summary.BEFORE, *cfg.attacks)
    prompts = (*concepts.PROMPTS, concepts.LEARNED)
    rows, labels = [], []
    for cell in sorted(
        by_cell, key=lambda c: (attacks.index(c.attack), prompts.index(c.prompt))
    ):
        point = by_cell[cell]["points"][-1]
        images = grid.read_sheet(workdir / point["sheet"], point["num"])
        rows.append(images[:_SHOWN])
        prompt = ""
        if len(cfg.prompts) > 1 and cell.is_attacked:
            prompt = f" by {cell.prompt}"
        share = table.recognized(by_cell[cell])
        labels.append(f"{cell.attack}{prompt}: {cell.method} ({share})")
    path = workdir / name
    grid.save_grid(rows, path, row_labels=labels)
    logging.info("images: %s", path)
