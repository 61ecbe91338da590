# SPDX-License-Identifier: Apache-2.0
"""The cells of a benchmark: each trains, attacks, draws and measures once."""

import dataclasses
import functools
import json
import pathlib
import shutil
import statistics
import time
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from rich.console import Console

from gift_jax import attack, train
from gift_jax.benchmark import matrix, summary
from gift_jax.benchmark import table as benchmark_table
from gift_jax.data import captions
from gift_jax.data.pairs import PairsSpec, load_pairs, resolve_names
from gift_jax.data.sources import emoji
from gift_jax.defenses import base as defenses_base
from gift_jax.metrics import judge
from gift_jax.metrics.base import EvalSet
from gift_jax.metrics.settings import Settings
from gift_jax.metrics.suite import MetricSuite
from gift_jax.models.load import load_model
from gift_jax.runtime import files, progress
from gift_jax.runtime.config import resolve_group
from gift_jax.runtime.devices import cpu_devices_for, init_jax
from gift_jax.runtime.errors import UserError
from gift_jax.runtime.versions import versions
from gift_jax.runtime.workdir import config_diff, log_to_file
from gift_jax.sampling import grid
from gift_jax.sampling.images import draw_images
from gift_jax.state import Step
from gift_jax.training import loop

_SHOWN = 8  # pictures of a cell in the grids


def run(cfg, workdir: pathlib.Path, command: str = "") -> pathlib.Path:
    """Does every cell that is not done; returns the path of results.json.

    Args: command: how it was called, for the results.
    """
    resolve_group(cfg, "metrics", Settings)
    bench = Bench(matrix.load(cfg), workdir)
    every = bench.matrix.cells
    left = [cell for cell in every if bench.result(cell) is None]
    init_jax(_cpu_devices(bench.matrix, left))  # the same for every job
    bench.log_here()
    logging.info("%d cells, of which %d are done", len(every), len(every) - len(left))
    logging.info("%s", describe_workload(bench.matrix, left))
    clock = progress.Clock(len(left))
    for cell in left:
        found = bench.do(cell)
        bench.log_here()
        logging.info(
            "%s: %s; %s", cell, benchmark_table.format_cell(found), clock.tick()
        )
    return bench.publish(command)


def describe_workload(jobs: matrix.Matrix, cells: list[matrix.Cell]) -> str:
    """Returns how much there is to do: what to count before a long run."""
    steps = sum(
        jobs.attack_config(c).steps for c in cells if c.attack != summary.BEFORE
    )
    pictures = sum(len(jobs.looks(c)) for c in cells) * jobs.cfg.samples.num
    made = {c.defence: c for c in cells if c.method != summary.ORIGINAL}.values()
    defended = [jobs.defence_config(cell) for cell in made]
    more = sum(c.steps for c in defended if defenses_base.DEFENSES[c.method].plan)
    return f"{more} steps of defence, {steps} of attack, {pictures} pictures to draw"


def _cpu_devices(jobs: matrix.Matrix, cells: list[matrix.Cell]) -> int:
    """Returns into how many devices to divide the cores: every batch divides by it."""
    configs = [
        jobs.attack_config(cell) for cell in cells if cell.attack != summary.BEFORE
    ]
    groups = [(cfg, attack.groups(cfg)) for cfg in configs]
    made = {
        cell.defence: cell for cell in cells if cell.method != summary.ORIGINAL
    }.values()
    configs = [jobs.defence_config(cell) for cell in made]
    groups += [(cfg, train.groups(cfg)) for cfg in configs]
    batches = [cfg[group].batch for cfg, names in groups for group in names]
    return cpu_devices_for(batches, {"data": 0, "fsdp": 1, "tensor": 1})


def _collect_versions(cells: list[dict[str, Any]]) -> dict[str, str]:
    """Returns what cells were made with and on: a long run may see several of each."""
    told: dict[str, set[str]] = {}
    for cell in cells:
        made = cell.get("versions", {}) | {"device": cell.get("device", "")}
        for name, value in made.items():
            told.setdefault(name, set()).add(value)
    found = {name: ", ".join(sorted(v - {""})) for name, v in told.items()}
    return {name: value for name, value in found.items() if value} or versions()


class Bench:
    """Does the matrix's cells, and keeps what they share: metrics, compiled steps."""

    def __init__(self, jobs: matrix.Matrix, workdir: pathlib.Path):
        self.matrix, self._cfg, self._workdir = jobs, jobs.cfg, workdir
        self._steps: dict[str, Step] = {}

    def log_here(self) -> None:
        """Turns the log file back from a cell's folder to the benchmark's own."""
        log_to_file(self._workdir)

    def result(self, cell: matrix.Cell) -> dict[str, Any] | None:
        """Returns what a cell measured, or None if it is not done.

        What a kill just after its result left beside it is removed.
        Raises: UserError if it was done with other settings.
        """
        path = self._workdir / cell.folder / "cell.json"
        if not path.exists():
            return None
        found = json.loads(path.read_text())
        mine = self._config(cell)
        changed = config_diff(found["config"], mine, finished=True)
        if changed:
            raise UserError(
                f"{path}: was done with another config ({changed}); use another "
                "--workdir, or delete that folder and the method's in defences/"
            )
        self._clear(cell.folder)
        return found

    def _clear(self, folder: str) -> None:
        """Removes what only a run that is not done needs."""
        for rest in ("checkpoints", "points"):
            shutil.rmtree(self._workdir / folder / rest, ignore_errors=True)

    def do(self, cell: matrix.Cell) -> dict[str, Any]:
        """Immunizes if that is to do, attacks, draws, judges; returns the result."""
        began = time.perf_counter()
        folder, at = self._workdir / cell.folder, self.matrix.looks(cell)
        paths = {step: folder / "points" / f"{step:06d}.json" for step in at}
        base, found = self._immunized(cell)

        def look(step: int, model) -> None:
            if not paths[step].exists():  # of a run that was stopped after it
                files.write_json(paths[step], self._judged(cell, model, step))

        if cell.attack == summary.BEFORE:
            look(0, load_model(base))
        else:
            cfg = self.matrix.attack_config(cell, base)
            attack.train(cfg, folder, shared=self._shared(cfg), at=at, look=look)
            found["step_s"] = _step_seconds(folder)
        found["points"] = [json.loads(path.read_text()) for path in paths.values()]
        found["seconds"] = round(time.perf_counter() - began, 1)
        found |= dataclasses.asdict(cell) | {"config": self._config(cell)}
        found["family"] = self.matrix.attack_kind(cell.attack)
        found |= {"metrics": self._suite.descriptions, "skipped": self._suite.skipped}
        found["device"] = jax.devices()[0].device_kind
        found["versions"] = versions()
        files.write_json(folder / "cell.json", found)
        self._clear(cell.folder)
        return found

    def _config(self, cell: matrix.Cell) -> dict[str, Any]:
        """Returns all that a cell depends on, as JSON has it."""
        group = self.matrix.groups[cell.concept]
        made = {"samples": self._cfg.samples, "side": group[cell.side]}
        made["metrics"] = self._cfg.metrics
        if cell.method != summary.ORIGINAL:
            made["defence"] = self.matrix.defence_config(cell)
        if cell.attack != summary.BEFORE:
            made["attack"] = self.matrix.attack_config(cell)
        made = {name: part.to_dict() for name, part in made.items()}
        made["looks"] = self.matrix.looks(cell)
        return json.loads(json.dumps(made))

    def _immunized(self, cell: matrix.Cell) -> tuple[str, dict[str, Any]]:
        """Returns (the model's folder, what making it took), making it if need be."""
        if cell.method == summary.ORIGINAL:
            return self._cfg.model, {}
        folder = self._workdir / cell.defence
        done = folder / "defence.json"
        if not done.exists():
            began = time.perf_counter()
            train.run(self.matrix.defence_config(cell), folder)
            seconds = round(time.perf_counter() - began, 1)
            step_s = _step_seconds(folder)
            found = {"defence_seconds": seconds, "defence_step_s": step_s}
            files.write_json(done, found)
        self._clear(cell.defence)
        return str(folder / "export"), json.loads(done.read_text())

    def _shared(self, cfg: ConfigDict):
        """Returns plan -> its step, or the one of an equal attack, compiled already."""
        made = {name: cfg[name] for name in ("lora", "dreambooth", "inversion")}
        made = {name: group.to_dict() for name, group in made.items()}
        tx = cfg.optimizer.to_dict()
        if tx["schedule"] == "constant" and not tx["warmup_frac"]:
            del tx["lr"]  # a part of the state
        else:
            tx["steps"] = cfg.steps
        key = json.dumps([cfg.attack, made, tx, cfg.accumulate], sort_keys=True)
        return lambda plan: self._steps.setdefault(key, loop.compile_step(plan.step))

    @functools.cached_property
    def _suite(self) -> MetricSuite:
        return MetricSuite(resolve_group(self._cfg, "metrics", Settings))

    def _judged(self, cell: matrix.Cell, model, step: int) -> dict[str, Any]:
        """Returns what the metrics say of the pictures that a model now draws."""
        how, side = self._cfg.samples.copy_and_resolve_references(), self._side(cell)
        how.seed += cell.seed
        template = ""
        if cell.attack != summary.BEFORE:
            template = self.matrix.attack_config(cell).data.template
        wanted = matrix.prompts_for(side, how.num, template)
        prompts = [prompt for prompt, _, _ in wanted]
        images = draw_images(model, model.params["unet"], prompts, how)
        sheet = cell.folder / f"{step:06d}.png"
        grid.save_sheet(images, self._workdir / sheet)
        values = self._suite.measure(self._eval_set(cell, images, wanted))
        numbers = {value.name: value.as_json() for value in values}
        point = {"step": step, "num": how.num, "sheet": str(sheet)}
        point["values"] = {name: found["value"] for name, found in numbers.items()}
        point["samples"] = {
            name: found["samples"]
            for name, found in numbers.items()
            if "samples" in found
        }
        seen = judge.load()
        things, styles = seen.name(images)
        point["things"] = [seen.concepts[i] for i in things]
        point["styles"] = [seen.styles[i] for i in styles]
        return point

    def _side(self, cell: matrix.Cell) -> ConfigDict:
        return self.matrix.groups[cell.concept][cell.side]

    def _eval_set(self, cell: matrix.Cell, images: np.ndarray, wanted) -> EvalSet:
        """Returns the pictures beside real ones.

        Accepted is, of a forbidden style, the style; of known safe things, each thing
        itself; else any of the side's things.
        """
        side, label_kind = self._side(cell), "concept"
        things = sorted({thing for _, thing, _ in wanted})
        if (
            cell.side == summary.HARMFUL
            and self.matrix.groups[cell.concept].label_kind == "style"
        ):
            label_kind = "style"
            labels = [{style} for _, _, style in wanted]
        elif cell.side == matrix.KEPT:
            labels = [{thing} for _, thing, _ in wanted]
        else:
            names = resolve_names(side.names, emoji.all_concepts())
            labels = [set(names)] * len(wanted)
        spec = PairsSpec(names=tuple(things), styles=tuple(side.styles))
        training = load_pairs(spec).images
        spec = dataclasses.replace(spec, held_out=True)
        references = load_pairs(spec).images
        named = [captions.fill(captions.TEMPLATES[0], t, s) for _, t, s in wanted]
        return EvalSet(images, named, labels, label_kind, references, training)

    def publish(self, command: str) -> pathlib.Path:
        """Writes results.json, results.md and the grids; returns the first's path."""
        by_cell = {cell: self.result(cell) for cell in self.matrix.cells}
        found = list(by_cell.values())
        versions = _collect_versions(found)
        said: dict[str, Any] = {"metrics": {}, "skipped": {}}
        for one in found:
            del one["config"]
            one.pop("versions", None)
            for name, parts in said.items():
                parts |= one.pop(name)
        results = {
            "name": self._cfg.name,
            "command": command,
            "config": json.loads(json.dumps(self._cfg.to_dict())),
            "versions": versions,
            **said,
            "summary": summary.summarize(found, tuple(self._cfg.similarities)),
            "cells": found,
        }
        path = self._workdir / "results.json"
        files.write_json(path, results)
        text = benchmark_table.markdown(results)
        files.write(self._workdir / "results.md", text)
        for concept in self.matrix.groups:
            for side in matrix.SIDES:
                self._picture(by_cell, concept, side)
        Console(width=120).print(text, soft_wrap=True, highlight=False, markup=False)
        return path

    def _picture(
        self, by_cell: dict[matrix.Cell, Any], concept: str, side: str
    ) -> None:
        """Writes a grid with a row for each attack and method of one side."""
        mine = [c for c in by_cell if (c.concept, c.side) == (concept, side)]
        attacks, prompts = (summary.BEFORE, *self._cfg.attacks), matrix.PROMPTS
        mine.sort(key=lambda c: (attacks.index(c.attack), prompts.index(c.prompt)))
        rows, labels = [], []
        for cell in mine:
            found = by_cell[cell]
            point = found["points"][-1]
            sheet = self._workdir / point["sheet"]
            rows.append(grid.read_sheet(sheet, point["num"])[:_SHOWN])
            attack = cell.attack
            if len(self._cfg.prompts) > 1 and attack != summary.BEFORE:
                attack += f" by {cell.prompt}"
            labels.append(
                f"{attack}: {cell.method} ({benchmark_table.format_cell(found)})"
            )
        path = self._workdir / f"{concept}_{side}.png".replace(" ", "_")
        grid.save_grid(rows, path, row_labels=labels)
        logging.info("pictures: %s", path)


def _step_seconds(folder: pathlib.Path) -> float | None:
    """Returns the median of what metrics.jsonl says a step took; None: no steps."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return None
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    times = [line["time/step_s"] for line in lines if "time/step_s" in line]
    return statistics.median(times) if times else None
