# SPDX-License-Identifier: Apache-2.0
"""One point of a cell: what a model draws at some step of an attack, measured."""

import functools
import pathlib
from typing import Any

import numpy as np

from gift_jax.benchmark import concepts, summary
from gift_jax.benchmark.matrix import Cell, Matrix
from gift_jax.data.cache import DataGroup, ImageSource
from gift_jax.data.pairs import Pairs
from gift_jax.metrics import judge
from gift_jax.metrics.suite import MetricSuite
from gift_jax.models.load import load_named
from gift_jax.runtime import files
from gift_jax.sampling import grid
from gift_jax.sampling.generated import load_group
from gift_jax.sampling.images import draw_images

_BATCH = 8  # images of `num_generated` drawn at once


class Evaluator:
    """Draws and measures samples; what several points need is loaded once."""

    def __init__(self, matrix: Matrix, workdir: pathlib.Path):
        self._matrix, self._workdir = matrix, workdir
        self._read: dict[tuple, Pairs] = {}
        self._twins: dict[tuple, np.ndarray] = {}

    @functools.cached_property
    def metrics(self) -> MetricSuite:
        return MetricSuite(self._matrix.fields.metrics)

    @functools.cached_property
    def original(self) -> Any:
        """The original model, which draws the twins and the images of num_generated."""
        return load_named(self._matrix.model_fields())

    def read(self, images: ImageSource, field: str, held_out: bool = False) -> Pairs:
        """Returns the pairs of a source; each is read once."""
        key = images, held_out
        if key not in self._read:
            model, group = self.original, DataGroup(**vars(images), batch=_BATCH)
            self._read[key] = load_group(
                model, group, field, model.image_size, held_out=held_out
            )
        return self._read[key]

    def check_images(self) -> None:
        """Raises UserError if a concept's attacker has images of the defense."""
        for name, concept in self._matrix.concepts.items():
            if concept.disjoint:
                field = f"definitions.concepts.{name}"
                theirs = self.read(concept.defense_data, f"{field}.defense_data")
                own = self.read(concept.harmful.images, f"{field}.harmful.images")
                concepts.check_disjoint(theirs, own, f"config.{field}")

    def evaluate(self, cell: Cell, model, step: int) -> dict[str, Any]:
        """Returns a point: the metrics of the samples that a model now draws.

        The samples themselves are written as one sheet beside the cell, with what is
        known of each.
        """
        concept = self._matrix.concepts[cell.concept]
        samples = self._matrix.samples(cell)
        drawings, references, training = self._drawings(cell, concept, samples.num)
        texts = [drawing.text for drawing in drawings]
        images = draw_images(model, texts, samples)
        twins = None
        if cell.side == summary.RETAINED and cell.is_defended:
            twins = self._drawn_by_original(texts, samples)
        eval_set = concepts.eval_set(
            concept, cell.side, images, drawings, references, training, twins
        )
        results = [result.as_json() for result in self.metrics.measure(eval_set)]
        sheet = self._workdir / cell.folder / f"{step:06d}.png"
        grid.save_sheet(images, sheet)
        marks = {r["metric"]: r["samples"] for r in results if "samples" in r}
        if self._matrix.fields.metrics.classifier == "judge":
            marks["labels"] = _labels(images)
        files.write_json(sheet.with_suffix(".json"), marks)
        return {
            "step": step,
            "num": samples.num,
            "values": {r["metric"]: round(r["value"], 4) for r in results},
        }

    def _drawings(self, cell: Cell, concept: concepts.Concept, num: int):
        """Returns (what samples are drawn for, references, training images)."""
        field = f"definitions.concepts.{cell.concept}.{cell.side}.images"
        side = getattr(concept, cell.side)
        images = side.images
        prompt = name = getattr(side, "prompts", concepts.Prompts()).name
        training = None
        if cell.is_attacked:
            images = self._matrix.taught(cell)
            prompt = self._matrix.prompt(cell)
            training = self.read(images, field)
        prompted = self.read(concepts.called(images, prompt), field)
        named = self.read(concepts.called(images, name), field)
        references = self.read(side.images, field, held_out=True)
        drawings = concepts.drawings(concept, cell.side, num, prompted, named)
        return drawings, references, training

    def _drawn_by_original(self, texts: list[str], samples) -> np.ndarray:
        key = tuple(texts), samples
        if key not in self._twins:
            self._twins = {key: draw_images(self.original, texts, samples)}
        return self._twins[key]


def _labels(samples) -> list[str]:
    """Returns the concept that the judge sees in each sample."""
    classifier = judge.load()
    concept_ids, _ = classifier.name(samples)
    return [classifier.concepts[i] for i in concept_ids]
