# SPDX-License-Identifier: Apache-2.0
"""The images that a model draws for a list of prompts, and grids of them."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from PIL import Image

from gift_jax.data.images import read_image
from gift_jax.runtime import config, files, progress
from gift_jax.runtime.errors import UserError, not_empty
from gift_jax.sampling import grid, sampler, schedules


@dataclasses.dataclass(frozen=True)
class Samples:
    """The fields of the images that a run draws of its model."""

    prompts: tuple[str, ...] = config.value(
        (), """a row of the grid each: one text, or a list '["a cat, 4k", "a dog"]'"""
    )
    num: int = config.number(8, low=0, doc="images a prompt; 0: none")
    seed: int = config.number(1, low=0, doc="of the noise")
    guidance: float = config.number(7.5, low=1, doc="scale; 1: none")
    steps: int = config.number(25, low=1, doc="of the sampler")
    scheduler: str = config.choice(
        "", ("", *schedules.SCHEDULERS), "empty: the model's own"
    )
    batch: int = config.number(4, low=1, doc="images drawn at once")

    def check(self, field: str) -> None:
        if self.num:
            not_empty(f"{field}.prompts", self.prompts)


def check_samples(model, samples: Any, field: str = "config.samples") -> None:
    """Raises UserError if the model's scheduler cannot draw samples that are asked for.

    Args: samples: `Samples`, or another with num, steps and scheduler.
    """
    if samples.num:
        config = model.scheduler_config
        check_scheduler(config, field, samples.steps, samples.scheduler)


def check_scheduler(config: Any, field: str, steps: int, scheduler: str) -> None:
    """Raises UserError if a scheduler, or the config's own, has no table of the steps.

    Args: config: the scheduler_config.json dict. field: the group that has the fields.
      scheduler: see `schedules.schedule`.
    """
    limit = config.get("num_train_timesteps", 1000)
    if steps > limit:
        raise UserError(
            f"{field}.steps={steps} must be at most {limit}, the model's training "
            "timesteps"
        )
    try:
        schedules.schedule(config, scheduler, steps)
    except UserError as error:
        raise UserError(f"{field}.scheduler={scheduler!r}: {error}") from None


def draw_images(
    model,
    prompts: Sequence[str],
    samples,
    first: int = 0,
    *,
    numbers: np.ndarray | None = None,
    negative_prompt: str = "",
    **options,
) -> np.ndarray:
    """Returns one image a prompt, uint8 "N H W 3".

    Args: samples: `Samples`, or another with seed, guidance, steps, scheduler and batch
      (images at once). first: number of the first image. numbers: int "N", in place of
      first, first + 1 ...: image i has the noise of the seed and numbers[i], whatever
      the batch. negative_prompt: what to steer away from. options: on_batch, see
      `sampler.sample_images`.
    """
    distinct = list(dict.fromkeys(prompts))
    row_of = {prompt: row for row, prompt in enumerate(distinct)}
    cond = jax.tree.map(np.asarray, model.encode_text(distinct))
    rows = [row_of[prompt] for prompt in prompts]
    if numbers is None:
        numbers = first + np.arange(len(prompts))
    return sampler.sample_images(
        model,
        jax.tree.map(lambda a: a[rows], cond),
        model.encode_text([negative_prompt]),
        jax.random.key(samples.seed),
        numbers,
        samples.batch,
        steps=samples.steps,
        guidance=samples.guidance,
        scheduler=samples.scheduler,
        **options,
    )


def draw_to_folder(
    model, prompts: Sequence[str], samples, folder: pathlib.Path
) -> np.ndarray:
    """Returns one image a prompt, uint8 "N H W 3", each drawn once and kept as a PNG.

    Args: samples: see `draw_images`. folder: where an interrupted call left some.
    """
    paths = [folder / f"{i:05d}.png" for i in range(len(prompts))]
    folder.mkdir(parents=True, exist_ok=True)
    size = samples.batch
    with progress.bar("draw", len(paths)) as bar:
        for first in range(0, len(paths), size):
            batch = paths[first : first + size]
            if not all(path.exists() for path in batch):
                texts = list(prompts[first : first + size])
                texts += texts[-1:] * (size - len(texts))  # one shape, one compilation
                images = draw_images(model, texts, samples, first)
                for path, image in zip(batch, images, strict=False):
                    with files.atomic_write(path) as temporary:
                        Image.fromarray(image).save(temporary)
            bar.update(first + len(batch))
    return np.stack([read_image(path, model.image_size) for path in paths])


def save_image_grid(model, prompts, samples, path: pathlib.Path) -> None:
    """Writes a PNG with samples.num images a prompt, a row each."""
    repeated = [prompt for prompt in prompts for _ in range(samples.num)]
    images = draw_images(model, repeated, samples)
    rows = images.reshape(len(prompts), samples.num, *images.shape[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save_grid(list(rows), path, row_labels=list(prompts))
    logging.info("samples: %s", path)
