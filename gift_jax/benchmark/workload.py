# SPDX-License-Identifier: Apache-2.0
"""How much a benchmark has to do, and on how many devices it does it."""

from collections.abc import Sequence

from gift_jax import attack, train
from gift_jax.benchmark.matrix import Cell, Matrix
from gift_jax.defenses import base as defenses
from gift_jax.runtime.devices import cpu_devices_for


def describe(matrix: Matrix, cells: Sequence[Cell]) -> str:
    """Returns the steps to train and the images to draw, to read before a long run."""
    configs = [matrix.defense_config(cell) for cell in _defended(cells)]
    steps = sum(cfg.steps for cfg in configs if defenses.load(cfg.method).plan)
    attacked = [cell for cell in cells if cell.is_attacked]
    attack_steps = sum(matrix.attack_config(cell).steps for cell in attacked)
    points = sum(len(matrix.eval_steps(cell)) for cell in cells)
    images = points * matrix.fields.samples.num
    return (
        f"{steps} steps of defense, {attack_steps} of attack, {images} images to draw"
    )


def cpu_devices(matrix: Matrix, cells: Sequence[Cell]) -> int:
    """Returns into how many devices to divide the cores: every batch divides by it."""
    runs = [attack.resolve(matrix.attack_config(c)) for c in cells if c.is_attacked]
    runs += [train.resolve(matrix.defense_config(c)) for c in _defended(cells)]
    batches = [group.batch for run in runs for group in run.data.values()]
    return cpu_devices_for(batches, {"data": 0, "fsdp": 1, "tensor": 1})


def _defended(cells: Sequence[Cell]) -> list[Cell]:
    """Returns a cell of each defended model."""
    return list({c.defense_folder: c for c in cells if c.is_defended}.values())
