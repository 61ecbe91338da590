# SPDX-License-Identifier: Apache-2.0
"""Measures what a model draws, or images drawn elsewhere.

    python -m gift_jax.evaluate --config configs/emoji_evaluate.py \\
        --config.model=runs/attacked/export --workdir runs/evaluated
    python -m gift_jax.evaluate --config configs/emoji_evaluate.py \\
        --config.images.folder=DIR --workdir runs/evaluated

Images of a folder are measured as they are, and no model is loaded; what each should
show is images.prompt, or the folder's captions, and without either what needs a prompt
is skipped.

Every number comes with its backbone, version, protocol, threshold and scale. Writes
results.json, results.md, samples.png, nearest.png (each image beside the training image
nearest to it) and the images, which are drawn once: the same command resumes. A metric
whose weights or package are missing, or for which there are too few images, is skipped,
and says what it needs.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from rich.console import Console

from gift_jax.data import image_folder
from gift_jax.data.cache import DataGroup
from gift_jax.data.image_folder import ImageFolder
from gift_jax.data.pairs import SOURCES
from gift_jax.metrics import backbone, base, nearest, table
from gift_jax.metrics.settings import Settings
from gift_jax.metrics.suite import MetricSuite
from gift_jax.models import load
from gift_jax.runtime import cli, config, files
from gift_jax.runtime.devices import num_cores
from gift_jax.runtime.errors import UserError, at_least
from gift_jax.runtime.versions import versions
from gift_jax.runtime.workdir import prepare_workdir
from gift_jax.sampling import grid
from gift_jax.sampling.generated import load_group
from gift_jax.sampling.images import Samples, check_samples, draw_to_folder
from gift_jax.training import sharding

# real images of what the prompts ask for, and what the model was last trained on;
# either may be left without a source
GROUPS = ("reference_images", "training_images")
_NUM_NEAREST = 16  # images in nearest.png
_NUM_SHOWN = 64  # of a folder's images in samples.png


@dataclasses.dataclass(frozen=True)
class EvaluateFields(load.ModelFields):
    """The fields of this command's config, besides the `GROUPS`."""

    kind: str = config.choice("evaluate", ("evaluate",), "the command that it is for")
    seed: int = config.number(0, low=0, doc="of random crops")
    cpu_devices: int = config.number(
        0, low=0, doc="to make of a machine without accelerator; 0: one a core"
    )
    images: ImageFolder = config.group(ImageFolder)
    samples: Samples = config.group(Samples(num=25))
    accepted_labels: tuple[str, ...] = config.value(
        (), "that the classifier may give; none: the references' names"
    )
    label_kind: str = config.choice("concept", base.LABEL_KINDS, "of those labels")
    metrics: Settings = config.group(Settings)


def get_config() -> ConfigDict:
    """Returns the locked config of this command, for a config file to start from."""
    cfg = config.to_config(EvaluateFields())
    for group in GROUPS:
        cfg[group] = config.to_config(DataGroup)
    return cfg.lock()


def resolve(cfg: Any) -> tuple[EvaluateFields, dict[str, DataGroup]]:
    """Returns a config, every field checked, and those of `GROUPS` with a source."""
    fields = config.resolve(cfg, EvaluateFields)
    groups = {
        group: config.resolve_group(cfg, group, DataGroup)
        for group in GROUPS
        if any(cfg[group][source] for source in SOURCES)
    }
    if not fields.images.folder:
        at_least("config.samples.num", fields.samples.num, 1)
        return fields, groups
    of_model = [
        f"{name}.num_generated" for name in groups if groups[name].num_generated
    ]
    of_model += ["adapters"] if fields.adapters else []
    if of_model:
        raise UserError(
            f"config.{of_model[0]} is for a model, and config.images.folder takes "
            "images in place of one; clear either"
        )
    return fields, groups


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where the images come from: a model, or a folder of images.

    Attributes: name: the folder's. sha256: of its content. model: that draws them, or
      None. size: side of all images in pixels. images: uint8 "N H W 3", or None as long
      as the model has not drawn them. prompts: theirs, or None.
    """

    name: str
    sha256: str
    model: Any
    size: int
    images: np.ndarray | None
    prompts: list[str] | None
    count: int

    def as_json(self) -> dict[str, Any]:
        """Returns it as results.json holds it."""
        names = "model", "model_sha256", "images_folder", "images_sha256"
        own, others = (self.name, self.sha256), (None, None)
        values = own + others if self.model else others + own
        return dict(zip(names, values, strict=True))


def run(cfg: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """Draws or reads, measures, writes; returns the path of results.json."""
    run, groups = resolve(cfg)
    source = _folder(run) if run.images.folder else _model(cfg, run, workdir)
    suite, eval_set = MetricSuite(run.metrics), _eval_set(run, groups, source)
    suite.check(eval_set, source.count)
    prepare_workdir(cfg, workdir, base=source.sha256)
    if source.model:
        images = workdir / "images"
        images = draw_to_folder(source.model, source.prompts, run.samples, images)
        eval_set = eval_set.replace(images=images)
    results = source.as_json() | {
        "prompts": source.prompts,
        "images": source.count,
        "metrics": [result.as_json() for result in suite.measure(eval_set)],
        "skipped": suite.skipped,
        "config": json.loads(json.dumps(cfg.to_dict())),
        "versions": versions(),
    }
    path = workdir / "results.json"
    files.write_json(path, results)
    files.write(workdir / "results.md", table.markdown(results))
    text = table.markdown(results, with_provenance=False)
    _save_grids(run.samples if source.model else None, workdir, suite, eval_set)
    logging.info("results: %s; results.md says what each was measured with", path)
    Console(width=120).print(text, soft_wrap=True, highlight=False, markup=False)
    return path


def _model(cfg: ConfigDict, run: EvaluateFields, workdir: pathlib.Path) -> _Source:
    """Returns the model that is to draw, loaded."""
    cfg.revision = load.pin_revision(run, workdir)
    sharding.make_default_mesh(run.cpu_devices or load.cpu_devices_to_draw(run.model))
    model = load.load_named(dataclasses.replace(run, revision=cfg.revision))
    check_samples(model, run.samples)
    prompts = [p for p in run.samples.prompts for _ in range(run.samples.num)]
    sha256 = model.folder.content_hash()
    name, size, count = str(model.path), model.image_size, len(prompts)
    return _Source(name, sha256, model, size, None, prompts, count)


def _folder(run: EvaluateFields) -> _Source:
    """Returns the images of a folder, read."""
    sharding.make_default_mesh(run.cpu_devices or num_cores())
    images, prompts = run.images.read("config.images", run.resolution, run.seed)
    logging.info("measuring %d images of %s", len(images), run.images.folder)
    sha256 = image_folder.content_hash(images, prompts)
    name, size, count = run.images.folder, images.shape[1], len(images)
    return _Source(name, sha256, None, size, images, prompts, count)


def _eval_set(run: EvaluateFields, groups, source: _Source) -> base.EvalSet:
    """Returns what the images, which may not be drawn yet, are measured against."""
    size = source.size
    data = {
        name: load_group(source.model, group, name, size, run.seed)
        for name, group in groups.items()
    }
    labels, references = run.accepted_labels, groups.get("reference_images")
    if not labels and references and references.names:  # captions are no labels
        pairs = data["reference_images"]
        labels = pairs.concepts if run.label_kind == "concept" else pairs.styles
    no_images = np.empty((0, size, size, 3), np.uint8)
    return base.EvalSet(
        no_images if source.images is None else source.images,
        source.prompts,
        [set(labels)] * source.count if labels else None,
        run.label_kind,
        **{name: pairs.images for name, pairs in data.items()},
    )


def _save_grids(samples, workdir, suite: MetricSuite, eval_set: base.EvalSet) -> None:
    """Writes samples.png, and nearest.png if there are training images.

    Args: samples: what the model drew, a row for each prompt; None: images of a folder.
    """
    images, training = eval_set.images, eval_set.training_images
    rows, labels = images[:_NUM_SHOWN], ()
    if samples:
        rows = list(images.reshape(-1, samples.num, *images.shape[1:]))
        labels = list(samples.prompts)
    grid.save_grid(rows, workdir / "samples.png", row_labels=labels)
    backbones = suite.backbones("nearest.png", backbone.IMAGES)
    if training is None or not backbones:
        return
    images = images[:_NUM_NEAREST]
    cosine, index = nearest.nearest_images(backbones[0], images, training)
    grid.save_grid(
        [images, training[index]],
        workdir / "nearest.png",
        row_labels=["drawn", "nearest training image"],
        column_labels=[f"{c:.2f}" for c in cosine],
    )


def main(argv: list[str] | None = None) -> int:
    run(
        *cli.parse(
            argv,
            __doc__,
            "evaluate",
            lambda cfg: config.describe(EvaluateFields, cfg),
        )
    )
    return 0


if __name__ == "__main__":
    cli.run_main(main)
