# SPDX-License-Identifier: Apache-2.0
"""Measures what a model draws, or pictures drawn elsewhere.

    python -m gift_jax.evaluate --config configs/emoji_evaluate.py \\
        --config.model=runs/attacked/export --workdir runs/evaluated

Every number comes with its backbone, version, protocol, threshold and scale, per
picture and in the mean. Writes results.json, results.md, samples.png, nearest.png (each
picture beside the training picture nearest to it) and the pictures, which are drawn
once: the same command goes on where it was stopped. A metric whose weights or package
are missing is skipped, and says what it wants.
"""

import json
import pathlib
from typing import Any

import numpy as np
from absl import logging
from PIL import Image
from rich.console import Console

from gift_jax.data.images import read_image
from gift_jax.data.pairs import SOURCES
from gift_jax.metrics import recognition, similarity, suite
from gift_jax.models import weights
from gift_jax.models.load import cpu_devices_to_draw
from gift_jax.runtime import cli, files, progress
from gift_jax.runtime.errors import UserError, choice
from gift_jax.runtime.versions import versions
from gift_jax.runtime.workdir import prepare_workdir
from gift_jax.sampling import grid
from gift_jax.sampling.images import draw_images, load_configured, read_pairs
from gift_jax.training import setup, sharding

GROUPS = ("references", "training")
_SHOWN = 16  # pictures in nearest.png


def check(cfg) -> None:
    """Raises UserError naming the field, before anything is drawn."""
    suite.check(cfg.panel)
    choice("config.trait", cfg.trait, suite.TRAITS)
    used = tuple(group for group in GROUPS if _is_given(cfg[group]))
    setup.check(cfg, data=used, optimizers=())
    if not cfg.samples.num:
        raise UserError("config.samples.num=0 must be at least 1; try 25")


def _is_given(spec) -> bool:
    return any(spec[source] for source in SOURCES)


def run(cfg, workdir: pathlib.Path) -> pathlib.Path:
    """Draws, measures, writes; returns the path of results.json."""
    check(cfg)
    sharding.make_default_mesh(cfg.cpu_devices or cpu_devices_to_draw(cfg.model))
    model = load_configured(cfg, workdir)
    base = weights.content_hash(model.path)
    given = {
        group: read_pairs(model, cfg[group], group, model.image_size, cfg.seed)
        for group in GROUPS
        if _is_given(cfg[group])
    }
    known = {group: data.images for group, data in given.items()}
    prompts = [p for p in cfg.samples.prompts for _ in range(cfg.samples.num)]
    right = _right(cfg, given, prompts)
    if right and "recognition" in cfg.panel.metrics:
        names = set().union(*right)
        recognition.check_names(cfg.panel.classifier, cfg.trait, names)
    prepare_workdir(cfg, workdir, base=base)
    images = _drawn(model, cfg, prompts, workdir / "pictures")
    exhibit = suite.EvalSet(images, prompts, right, cfg.trait, **known)
    judges = suite.MetricSuite(cfg.panel, known.get("references"))
    values = [value.as_json() for value in judges.measure(exhibit)]
    results = {
        "model": str(model.path),
        "model_sha256": base,
        "prompts": prompts,
        "pictures": len(images),
        "metrics": values,
        "skipped": judges.skipped,
        "config": json.loads(json.dumps(cfg.to_dict())),
        "versions": versions(),
    }
    path = workdir / "results.json"
    files.write_json(path, results)
    text = markdown(results)
    files.write(workdir / "results.md", text)
    _pictures(cfg, workdir, images, judges, known.get("training"))
    Console(width=120).print(text, soft_wrap=True, highlight=False, markup=False)
    return path


def _right(cfg, given, prompts) -> list[set[str]] | None:
    """Returns the names that a classifier may say of each picture, or None."""
    if cfg.right:
        return [set(cfg.right)] * len(prompts)
    if "references" not in given or not cfg.references.names:
        return None  # a folder's captions are no labels
    data = given["references"]
    names = data.concept_names if cfg.trait == "thing" else tuple(data.styles)
    return [set(names)] * len(prompts)


def _drawn(model, cfg, prompts: list[str], folder: pathlib.Path) -> np.ndarray:
    """Returns one picture a prompt, each drawn once and kept as a PNG."""
    paths = [folder / f"{i:05d}.png" for i in range(len(prompts))]
    size, unet = cfg.samples.batch, model.params["unet"]
    folder.mkdir(parents=True, exist_ok=True)
    with progress.bar("draw", len(paths)) as bar:
        for first in range(0, len(paths), size):
            some = paths[first : first + size]
            if not all(path.exists() for path in some):
                told = prompts[first : first + size]
                told += told[-1:] * (size - len(told))  # one shape, one compilation
                drawn = draw_images(model, unet, told, cfg.samples, first)
                for path, image in zip(some, drawn, strict=False):
                    with files.atomic_write(path) as aside:
                        Image.fromarray(image).save(aside)
            bar.update(first + len(some))
    return np.stack([read_image(path, model.image_size) for path in paths])


def _pictures(cfg, workdir, images, judges: suite.MetricSuite, training) -> None:
    """Writes samples.png, and nearest.png if there are training pictures."""
    rows = images.reshape(-1, cfg.samples.num, *images.shape[1:])
    path = grid.save_grid(
        list(rows), workdir / "samples.png", row_labels=list(cfg.samples.prompts)
    )
    logging.info("samples: %s", path)
    backbones = judges.backbones("nearest")
    if training is None or not backbones:
        return
    shown = images[:_SHOWN]
    cosine, index = similarity.nearest_pictures(backbones[0], shown, training)
    path = grid.save_grid(
        [shown, training[index]],
        workdir / "nearest.png",
        row_labels=["drawn", "nearest training picture"],
        column_labels=[f"{c:.2f}" for c in cosine],
    )
    logging.info("nearest training pictures: %s", path)


def markdown(results: dict[str, Any]) -> str:
    """Returns the table: metric, value, what higher means, and how it was made."""
    lines = [f"{results['pictures']} pictures by {results['model']}", ""]
    lines += ["| metric | value | higher is | how |", "| --- | --- | --- | --- |"]
    for found in results["metrics"]:
        how = ", ".join(f"{name} {value}" for name, value in found["how"].items())
        row = found["metric"], f"{found['value']:.4f}", found["higher"], how
        lines.append("| " + " | ".join(row) + " |")
    for name, why in results["skipped"].items():
        lines += ["", f"Skipped {name}: {why}"]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    cfg, workdir = cli.parse(argv, __doc__, "evaluate")
    run(cfg, workdir)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
