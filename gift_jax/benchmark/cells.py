# SPDX-License-Identifier: Apache-2.0
"""The cells of a benchmark: each trains, attacks, draws and measures once."""

import dataclasses
import json
import pathlib
import shutil
import statistics
import time
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from gift_jax import attack, train
from gift_jax.attacks import base as attacks
from gift_jax.benchmark import results, table, workload
from gift_jax.benchmark.evaluation import Evaluator
from gift_jax.benchmark.matrix import Cell, Matrix, load
from gift_jax.models.load import load_model, model_folder
from gift_jax.models.sd import stable_diffusion
from gift_jax.runtime import files, progress
from gift_jax.runtime.devices import init_jax
from gift_jax.runtime.errors import UserError
from gift_jax.runtime.workdir import config_diff, log_to_file
from gift_jax.sampling.images import check_scheduler
from gift_jax.state import Step
from gift_jax.training import loop

# Fields of an attack's config that its compiled step does not depend on.
_PER_RUN = ("model", "revision", "seed", "steps", "samples", "log_every", "checkpoints")


def run(cfg: ConfigDict, workdir: pathlib.Path, command: str = "") -> pathlib.Path:
    """Runs every cell that is not done; returns the path of results.json.

    Args: command: the command line, for the results.
    """
    matrix = load(cfg)
    bench, cells = Bench(matrix, workdir), matrix.cells
    left = [cell for cell in cells if bench.result(cell) is None]
    if left:
        _check_samples(matrix)
    init_jax(workload.cpu_devices(matrix, left))  # the same for every job
    log_to_file(workdir)
    logging.info("%d cells, of which %d are done", len(cells), len(cells) - len(left))
    logging.info("%s", workload.describe(matrix, left))
    clock = progress.Clock(len(left))
    for cell in left:
        result = bench.run_cell(cell)
        log_to_file(workdir)  # until now, the log went to the cell's folder
        logging.info("%s: %s; %s", cell, table.recognized(result), clock.tick())
    by_cell = {cell: bench.result(cell) for cell in cells}
    return results.publish(cfg, workdir, by_cell, command)


def _check_samples(matrix: Matrix) -> None:
    """Raises UserError if the model's scheduler cannot draw the samples."""
    samples, folder = matrix.fields.samples, model_folder(matrix.fields.model)
    config = stable_diffusion.read_scheduler(folder)
    check_scheduler(config, "config.samples", samples.steps, samples.scheduler)


class Bench:
    """Runs the matrix's cells, and keeps what they share: metrics, compiled steps."""

    def __init__(self, matrix: Matrix, workdir: pathlib.Path):
        self.matrix, self._workdir = matrix, workdir
        self._evaluator = Evaluator(matrix, workdir)
        self._steps: dict[str, Step] = {}

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """Returns what a cell measured, or None if it is not done.

        Files that a kill just after its result left behind are removed.
        Raises: UserError if it was done with other settings.
        """
        path = self._workdir / cell.folder / "cell.json"
        if not path.exists():
            return None
        result = json.loads(path.read_text())
        settings = self.matrix.settings(cell)
        changes = config_diff(result["config"], settings, finished=True)
        if changes:
            raise UserError(
                f"{path}: was done with another config ({changes}); use another "
                "--workdir, or delete that folder and the method's in defenses/"
            )
        self._remove_temporary(cell.folder)
        return result

    def run_cell(self, cell: Cell) -> dict[str, Any]:
        """Immunizes if need be, attacks, draws, measures; returns the result."""
        start = time.perf_counter()
        folder, steps = self._workdir / cell.folder, self.matrix.eval_steps(cell)
        paths = {step: folder / "points" / f"{step:06d}.json" for step in steps}
        defended, times = self._defended(cell)

        def evaluate(step: int, model) -> None:
            if not paths[step].exists():  # of a run that was stopped after it
                point = self._evaluator.evaluate(cell, model, step)
                files.write_json(paths[step], point)

        if cell.is_attacked:
            cfg = self.matrix.attack_config(cell, defended)
            share = self._shared_step(cfg)
            attack.train(cfg, folder, share=share, at_steps=steps, look=evaluate)
            times["step_s"] = _step_seconds(folder)
        else:
            evaluate(0, load_model(defended))
        points = [json.loads(path.read_text()) for path in paths.values()]
        times["seconds"] = round(time.perf_counter() - start, 1)
        result = self._result(cell, points) | times
        files.write(folder / "cell.json", json.dumps(result, sort_keys=True))
        self._remove_temporary(cell.folder)
        return result

    def _result(self, cell: Cell, points: list) -> dict[str, Any]:
        return dataclasses.asdict(cell) | {
            "points": points,
            "family": self.matrix.attack_family(cell.attack),
            "config": self.matrix.settings(cell),
            "metrics": self._evaluator.metrics.descriptions,
            "skipped": self._evaluator.metrics.skipped,
            "device": jax.devices()[0].device_kind,
            "versions": results.versions_and_commit(),
        }

    def _defended(self, cell: Cell) -> tuple[str, dict[str, Any]]:
        """Returns (the model's folder, seconds it took), training it if need be."""
        if not cell.is_defended:
            return self.matrix.fields.model, {}
        folder = self._workdir / cell.defense_folder
        path = folder / "defense.json"
        if not path.exists():
            start = time.perf_counter()
            train.run(self.matrix.defense_config(cell), folder)
            times = {
                "defense_seconds": round(time.perf_counter() - start, 1),
                "defense_step_s": _step_seconds(folder),
            }
            files.write_json(path, times)
        self._remove_temporary(cell.defense_folder)
        return str(folder / "export"), json.loads(path.read_text())

    def _shared_step(self, cfg: ConfigDict):
        """Returns plan -> its step, or the compiled one of an equal earlier attack."""
        tx = cfg.optimizer.to_dict()
        if tx["schedule"] == "constant" and not tx["warmup_frac"]:
            del tx["lr"]  # a part of the state
        else:
            tx["steps"] = cfg.steps
        per_run = {*_PER_RUN, "optimizer", *attacks.load(cfg.attack).groups}
        fixed = {k: v for k, v in cfg.to_dict().items() if k not in per_run}
        key = json.dumps([fixed, tx], sort_keys=True)
        return lambda plan: self._steps.setdefault(key, loop.compile_step(plan.step))

    def _remove_temporary(self, folder: pathlib.Path) -> None:
        """Removes what only an unfinished run needs."""
        for name in ("checkpoints", "points"):
            shutil.rmtree(self._workdir / folder / name, ignore_errors=True)


def _step_seconds(folder: pathlib.Path) -> float | None:
    """Returns the median seconds a step in metrics.jsonl; None if it took none."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return None
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    times = [line["time/step_s"] for line in lines if "time/step_s" in line]
    return statistics.median(times) if times else None
