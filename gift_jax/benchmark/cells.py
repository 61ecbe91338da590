# SPDX-License-Identifier: Apache-2.0
"""The cells of a benchmark: each trains, attacks, draws and measures once."""

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
from gift_jax.benchmark import store, table, workload
from gift_jax.benchmark.evaluation import Evaluator
from gift_jax.benchmark.matrix import Cell, Matrix
from gift_jax.benchmark.summary import ORIGINAL
from gift_jax.models.load import abstract_model, load_named
from gift_jax.runtime import files, progress
from gift_jax.runtime.devices import init_jax
from gift_jax.runtime.errors import UserError
from gift_jax.runtime.versions import versions_and_commit
from gift_jax.runtime.workdir import log_to_file
from gift_jax.sampling.images import check_samples
from gift_jax.state import Step
from gift_jax.training import loop

# Fields of an attack's config that its compiled step does not depend on.
_PER_RUN = (
    *("model", "revision", "seed", "steps", "samples", "log_every", "checkpoints"),
)
_WAIT_S = 1.0  # until work that other processes have is looked at again


def run(matrix: Matrix, workdir: pathlib.Path) -> None:
    """Runs every cell that is not done; other processes may run some of them.

    Raises: UserError for a mistake in the config, or a cell done with another one.
    """
    results = store.Store(workdir)
    left = unfinished(matrix, results)
    if not left:
        return
    init_jax(workload.cpu_devices(matrix, left))  # the same for every job
    _check_samples(matrix)
    log_to_file(workdir)
    bench = Bench(matrix, workdir, results)
    bench.evaluator.check_images()
    total = len(matrix.cells)
    logging.info("%d cells, of which %d are done", total, total - len(left))
    logging.info("%s", workload.describe(matrix, left))
    clock = progress.Clock(len(left))
    left = workload.longest_defense_first(matrix, left)
    while left:
        taken = [cell for cell in left if bench.try_cell(cell, clock)]
        if not taken:
            time.sleep(_WAIT_S)  # for other processes
        still = set(unfinished(matrix, results))
        left = [cell for cell in left if cell in still]


def unfinished(matrix: Matrix, results: store.Store) -> list[Cell]:
    """Returns the cells that have no result.

    Raises: UserError if one was done with other settings.
    """
    results.read()
    left = []
    for cell in matrix.cells:
        entry = results.cells.get(cell.id)
        if entry is None:
            left.append(cell)
            continue
        changed = store.changes(entry, matrix.digests(cell))
        if changed:
            raise UserError(
                f"{store.FILE}: {cell} was done with other settings of "
                f"{', '.join(changed)}; use another --workdir, or take its line out "
                "and delete the method's folder in defenses/"
            )
    return left


def _check_samples(matrix: Matrix) -> None:
    """Raises UserError if the model's scheduler cannot draw the samples."""
    fields = matrix.fields
    model = abstract_model(fields.model, revision=fields.revision)
    check_samples(model, fields.samples)


class Bench:
    """Runs the matrix's cells, and keeps what they share: metrics, compiled steps."""

    def __init__(self, matrix: Matrix, workdir: pathlib.Path, results: store.Store):
        self.matrix, self._workdir, self._results = matrix, workdir, results
        self.evaluator = Evaluator(matrix, workdir)
        self._steps: dict[str, Step] = {}

    def try_cell(self, cell: Cell, clock: progress.Clock) -> bool:
        """Runs a cell, unless another process has it or its defense; says whether."""
        with self._results.claim(cell.id) as mine:
            if not mine:
                return False
            self._results.read()
            if cell.id in self._results.cells:
                clock.tick()
                return True
            model, times = self._defended(cell)
            if not model:
                return False
            result = self.run_cell(cell, model, times)
            self._results.add(cell, result)
            metrics, device = self.evaluator.metrics, jax.devices()[0].device_kind
            self._results.describe(
                metrics=metrics.descriptions,
                skipped=metrics.skipped,
                versions={**versions_and_commit(), "device": device},
            )
            log_to_file(self._workdir)  # until now, the log went to the cell's folder
            logging.info("%s: %s; %s", cell, table.recognized(result), clock.tick())
            return True

    def run_cell(self, cell: Cell, model: str, times: dict) -> dict[str, Any]:
        """Attacks, draws, measures; returns the cell's line.

        Args: model: the folder of the defended model; `ORIGINAL` has none. times: of
          its defense.
        """
        start = time.perf_counter()
        folder, steps = self._workdir / cell.folder, self.matrix.eval_steps(cell)
        paths = {step: folder / "points" / f"{step:06d}.json" for step in steps}

        def evaluate(step: int, attacked) -> None:
            if not paths[step].exists():  # of a run that was stopped after it
                files.write_json(
                    paths[step], self.evaluator.evaluate(cell, attacked, step)
                )

        if cell.is_attacked:
            cfg = self.matrix.attack_config(cell, model if cell.is_defended else "")
            share = self._shared_step(cfg)
            attack.train(
                cfg,
                folder,
                share=share,
                at_steps=steps,
                look=evaluate,
                checkpoint_last=False,
            )
            times = times | {"step_s": _step_seconds(folder)}
        elif cell.is_defended:
            evaluate(0, load_named(self.matrix.model_fields(model)))
        else:
            evaluate(0, self.evaluator.original)
        points = [json.loads(path.read_text()) for path in paths.values()]
        for name in ("checkpoints", "points"):  # what an unfinished run needs
            shutil.rmtree(folder / name, ignore_errors=True)
        seconds = round(time.perf_counter() - start, 1)
        return {
            "points": points,
            "digests": self.matrix.digests(cell),
            "seconds": seconds,
            **{k: round(v, 4) for k, v in times.items() if v is not None},
        }

    def _defended(self, cell: Cell) -> tuple[str, dict[str, Any]]:
        """Returns (the model's folder, seconds it took), training it if need be.

        The folder is "" while another process trains it, `ORIGINAL` of no defense.
        """
        if not cell.is_defended:
            return ORIGINAL, {}
        folder = self._workdir / cell.defense_folder
        path = folder / "defense.json"
        if path.exists():
            return str(folder / "export"), json.loads(path.read_text())
        with self._results.claim(str(cell.defense_folder)) as mine:
            if not mine:
                return "", {}
            if not path.exists():
                start = time.perf_counter()
                train.run(self.matrix.defense_config(cell), folder)
                times = {
                    "defense_seconds": round(time.perf_counter() - start, 1),
                    "defense_step_s": _step_seconds(folder),
                }
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
                files.write_json(path, times)
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


def _step_seconds(folder: pathlib.Path) -> float | None:
    """Returns the median seconds a step in metrics.jsonl; None if it took none."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return None
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    times = [line["time/step_s"] for line in lines if "time/step_s" in line]
    return statistics.median(times) if times else None
