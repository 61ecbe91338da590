# SPDX-License-Identifier: Apache-2.0
"""How much a benchmark has to do, and on how many devices it does it."""

from collections.abc import Sequence

from gift_jax import attack, train
from gift_jax.benchmark.matrix import Cell, Matrix
from gift_jax.defenses import base as defenses
from gift_jax.runtime.devices import cpu_devices_for


def count(matrix: Matrix, cells: Sequence[Cell]) -> dict[str, int]:
    """Returns how many defenses, steps and images some cells take."""
    configs = [matrix.defense_config(cell) for cell in _defended(cells)]
    attacked = [cell for cell in cells if cell.is_attacked]
    points = [(len(matrix.eval_steps(c)), matrix.samples(c).num) for c in cells]
    return {
        "cells": len(cells),
        "defended models": len(configs),
        "defense steps": sum(map(_steps, configs)),
        "attack steps": sum(matrix.attack_steps(cell) for cell in attacked),
        "images": sum(number * num for number, num in points),
    }


def describe(matrix: Matrix, cells: Sequence[Cell]) -> str:
    """Returns the steps to train and the images to draw, to read before a long run."""
    counts = count(matrix, cells)
    return ", ".join(f"{number:,} {name}" for name, number in counts.items())


def device_hours(
    counts: dict[str, int], step_s: float, image_s: float, defense_s: float = 0.0
) -> float:
    """Returns the hours of one device.

    Args: counts: of `count`. step_s, image_s: seconds of an attack's step and of an
      image. defense_s: of a defense's step; 0: three of an attack's, as it has a lower
      and an upper update, and the latter's two passes.
    """
    seconds = counts["attack steps"] * step_s + counts["images"] * image_s
    seconds += counts["defense steps"] * (defense_s or 3 * step_s)
    return seconds / 3600


def cpu_devices(matrix: Matrix, cells: Sequence[Cell]) -> int:
    """Returns into how many devices to divide the cores: every batch divides by it."""
    runs = [attack.resolve(matrix.attack_config(c)) for c in cells if c.is_attacked]
    runs += [train.resolve(matrix.defense_config(c)) for c in _defended(cells)]
    batches = [group.batch for run in runs for group in run.data.values()]
    return cpu_devices_for(batches, {"data": 0, "fsdp": 1, "tensor": 1})


def longest_defense_first(matrix: Matrix, cells: Sequence[Cell]) -> list[Cell]:
    """Returns the cells, those of the defense with most steps first.

    One worker trains a defended model, while others have cells to go on with.
    """
    steps = {
        cell.defense_folder: _steps(matrix.defense_config(cell))
        for cell in _defended(cells)
    }
    return sorted(cells, key=lambda cell: -steps.get(cell.defense_folder, 0))


def _steps(cfg) -> int:
    """Returns the steps that a defense takes."""
    return cfg.steps if defenses.load(cfg.method).plan else 0


def _defended(cells: Sequence[Cell]) -> list[Cell]:
    """Returns a cell of each defended model."""
    return list({c.defense_folder: c for c in cells if c.is_defended}.values())
