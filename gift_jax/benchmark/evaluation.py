# SPDX-License-Identifier: Apache-2.0
"""One point of a cell: what a model draws at some step of an attack, measured."""

import dataclasses
import functools
import pathlib
from typing import Any

from gift_jax.benchmark import concepts
from gift_jax.benchmark.matrix import Cell, Matrix
from gift_jax.metrics import judge
from gift_jax.metrics.suite import MetricSuite
from gift_jax.sampling import grid
from gift_jax.sampling.images import draw_images


class Evaluator:
    """Draws and measures samples; the metrics are loaded once, when first needed."""

    def __init__(self, matrix: Matrix, workdir: pathlib.Path):
        self._matrix, self._workdir = matrix, workdir

    @functools.cached_property
    def metrics(self) -> MetricSuite:
        return MetricSuite(self._matrix.fields.metrics)

    def evaluate(self, cell: Cell, model, step: int) -> dict[str, Any]:
        """Returns a point: the metrics of the samples that a model now draws.

        The samples themselves are written as one sheet beside the cell.
        """
        cfg = self._matrix.fields.samples
        cfg = dataclasses.replace(cfg, seed=cfg.seed + cell.seed)
        template = ""
        if cell.is_attacked:
            template = self._matrix.attack_config(cell).data.template
        prompts = concepts.prompts_for(self._matrix.images(cell), cfg.num, template)
        texts = [prompt.text for prompt in prompts]
        samples = draw_images(model, model.params["unet"], texts, cfg)
        sheet = cell.folder / f"{step:06d}.png"
        grid.save_sheet(samples, self._workdir / sheet)
        concept = self._matrix.concepts[cell.concept]
        eval_set = concepts.eval_set(concept, cell.side, samples, prompts)
        results = [result.as_json() for result in self.metrics.measure(eval_set)]
        return {
            "step": step,
            "num": cfg.num,
            "sheet": str(sheet),
            "values": {r["metric"]: r["value"] for r in results},
            "samples": {r["metric"]: r["samples"] for r in results if "samples" in r},
            "labels": _labels(samples),
        }


def _labels(samples) -> dict[str, list[str]]:
    """Returns the concept and the style that the judge sees in each sample."""
    classifier = judge.load()
    concept_ids, styles = classifier.name(samples)
    return {
        "concept": [classifier.concepts[i] for i in concept_ids],
        "style": [classifier.styles[i] for i in styles],
    }
