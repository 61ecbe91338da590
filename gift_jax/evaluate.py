# SPDX-License-Identifier: Apache-2.0
"""Measures what a model draws.

    python -m gift_jax.evaluate --config configs/emoji_evaluate.py \\
        --config.model=runs/attacked/export --workdir runs/evaluated

Every number comes with its backbone, version, protocol, threshold and scale. Writes
results.json, results.md, samples.png, nearest.png (each image beside the training image
nearest to it) and the images, which are drawn once: the same command resumes. A metric
whose weights or package are missing is skipped, and says what it needs.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from rich.console import Console

from gift_jax.data.cache import DataGroup
from gift_jax.data.pairs import SOURCES
from gift_jax.metrics import backbone, base, nearest, table
from gift_jax.metrics.settings import Settings
from gift_jax.metrics.suite import MetricSuite
from gift_jax.models import load, weights
from gift_jax.runtime import cli, config, files
from gift_jax.runtime.errors import at_least
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


@dataclasses.dataclass(frozen=True)
class EvaluateFields(load.ModelFields):
    """The fields of this command's config, besides the `GROUPS`."""

    kind: str = config.choice("evaluate", ("evaluate",), "the command that it is for")
    seed: int = config.number(0, low=0, doc="of random crops")
    cpu_devices: int = config.number(
        0, low=0, doc="to make of a machine without accelerator; 0: one a core"
    )
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
    at_least("config.samples.num", fields.samples.num, 1)
    return fields, {
        group: config.resolve_group(cfg, group, DataGroup)
        for group in GROUPS
        if any(cfg[group][source] for source in SOURCES)
    }


def run(cfg: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    """Draws, measures, writes; returns the path of results.json."""
    run, groups = resolve(cfg)
    cfg.revision = load.pin_revision(run, workdir)
    sharding.make_default_mesh(run.cpu_devices or load.cpu_devices_to_draw(run.model))
    model = load.load_model(
        run.model,
        run.compute_dtype,
        revision=cfg.revision,
        variant=run.variant,
        resolution=run.resolution,
    )
    check_samples(model, run.samples)
    suite, sha256 = MetricSuite(run.metrics), weights.content_hash(model.path)
    eval_set = _eval_set(run, groups, model)
    suite.check(eval_set)
    prepare_workdir(cfg, workdir, base=sha256)
    prompts, folder = eval_set.prompts, workdir / "images"
    images = draw_to_folder(model, prompts, run.samples, folder)
    eval_set = eval_set.replace(images=images)
    results = {
        "model": str(model.path),
        "model_sha256": sha256,
        "prompts": prompts,
        "images": len(images),
        "metrics": [result.as_json() for result in suite.measure(eval_set)],
        "skipped": suite.skipped,
        "config": json.loads(json.dumps(cfg.to_dict())),
        "versions": versions(),
    }
    path = workdir / "results.json"
    files.write_json(path, results)
    text = table.markdown(results)
    files.write(workdir / "results.md", text)
    _save_grids(run.samples, workdir, suite, eval_set)
    logging.info("results: %s", path)
    Console(width=120).print(text, soft_wrap=True, highlight=False, markup=False)
    return path


def _eval_set(run: EvaluateFields, groups, model) -> base.EvalSet:
    """Returns what the images, not yet drawn, are to be measured against."""
    size = model.image_size
    prompts = [p for p in run.samples.prompts for _ in range(run.samples.num)]
    data = {
        name: load_group(model, group, name, size, run.seed)
        for name, group in groups.items()
    }
    labels, references = run.accepted_labels, groups.get("reference_images")
    if not labels and references and references.names:  # captions are no labels
        pairs = data["reference_images"]
        labels = pairs.concepts if run.label_kind == "concept" else pairs.styles
    return base.EvalSet(
        np.empty((0, size, size, 3), np.uint8),
        prompts,
        [set(labels)] * len(prompts) if labels else None,
        run.label_kind,
        **{name: pairs.images for name, pairs in data.items()},
    )


def _save_grids(samples, workdir, suite: MetricSuite, eval_set: base.EvalSet) -> None:
    """Writes samples.png, and nearest.png if there are training images."""
    images, training = eval_set.images, eval_set.training_images
    rows = images.reshape(-1, samples.num, *images.shape[1:])
    path = workdir / "samples.png"
    grid.save_grid(list(rows), path, row_labels=list(samples.prompts))
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
