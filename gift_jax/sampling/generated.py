# SPDX-License-Identifier: Apache-2.0
"""Training images that the model draws itself, kept between runs."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from PIL import Image

from gift_jax.data import captions
from gift_jax.data.images import read_image
from gift_jax.data.pairs import Pairs, join, load_pairs, pairs_spec
from gift_jax.runtime import files, progress
from gift_jax.runtime.errors import UserError
from gift_jax.sampling import images as sampling_images
from gift_jax.sampling.images import Samples, check_scheduler

_MAX_BATCH = 32  # images drawn at once


def load_group(
    model, group: Any, field: str, size: int, seed: int = 0, held_out: bool = False
) -> Pairs:
    """Returns the pairs of one data group of a config.

    Args: model: draws the images of `num_generated`; None for the other sources.
      group: see `pairs.PairsSpec` and `generate_images`. field: its name. size: side
      of the images in pixels. seed: of random crops. held_out: see `pairs.PairsSpec`.
    Raises: UserError naming the field or file.
    """
    pairs = load_pairs(
        pairs_spec(group, field, size=size, seed=seed, held_out=held_out),
        draw=lambda count: generate_images(model, group, field, [group.prompt], count),
    )
    if not getattr(group, "num_drawn", 0):
        return pairs
    return join(pairs, draw_pairs(model, group, field, pairs))


def draw_pairs(model, group: Any, field: str, pairs: Pairs) -> Pairs:
    """Returns `num_drawn` pairs that the model draws of what other pairs show.

    Their prompts are `drawn_prompts` of each concept, and where these name a style, of
    each style of `drawn_styles`, or else that the pairs have; one after the other.
    """
    styles = tuple(group.drawn_styles) or tuple(dict.fromkeys(pairs.styles))
    may_flip = dict(zip(pairs.concepts, pairs.may_flip.tolist(), strict=True))
    of_prompt = {}
    for template in group.drawn_prompts:
        styled = captions.check_template(field, template) & captions.OF_STYLE
        for style in styles if styled else ("",):
            for concept in pairs.concept_names:
                prompt = captions.fill(template, concept, style)
                of_prompt.setdefault(prompt, (concept, style))
    prompts = list(of_prompt)
    count = group.num_drawn
    images = generate_images(model, group, field, prompts, count)
    prompts = [prompts[i % len(prompts)] for i in range(count)]
    concepts, styles = zip(*(of_prompt[prompt] for prompt in prompts), strict=True)
    return Pairs(
        images=images,
        prompts=prompts,
        concepts=list(concepts),
        styles=list(styles),
        may_flip=np.asarray([may_flip[concept] for concept in concepts]),
    )


def generate_images(
    model, group: Any, field: str, prompts: Sequence[str], count: int
) -> np.ndarray:
    """Returns uint8 "N H W 3": `count` images that the model draws, prompt by prompt.

    They are kept in the cache folder, under a hash of all that they depend on: an
    interrupted run continues. Image i depends on the seed, i and its prompt alone.

    Args: group: generation.{seed,steps,guidance,scheduler} and batch (images at once,
      at most `_MAX_BATCH`). field: the group's name. prompts: image i has the i-th,
      from the first again after the last.
    Raises: UserError if the scheduler has no such steps, or the cache folder cannot be
      written.
    """
    how = group.generation
    config, name = model.scheduler_config, f"config.{field}.generation"
    check_scheduler(config, name, how.steps, how.scheduler)
    settings = {
        "model_sha256": model.folder.content_hash(),
        "variant": model.variant,
        "prompt": prompts[0] if len(prompts) == 1 else list(prompts),
        "seed": how.seed,
        "steps": how.steps,
        "guidance": float(how.guidance),
        "scheduler": how.scheduler or "the model's own",
        "dtype": jnp.dtype(model.dtype).name,
        "size": model.image_size,
    }
    text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    folder = files.cache_folder() / "generated" / digest
    paths = [folder / f"{i:05d}.png" for i in range(count)]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    logging.info("%s: drawing %d of %d images", field, len(missing), count)
    logging.info("%s: %r ..., kept in %s", field, prompts[0], folder)
    images = np.empty((count, model.image_size, model.image_size, 3), np.uint8)
    for i in set(range(count)) - set(missing):
        images[i] = read_image(paths[i], model.image_size)
    with progress.bar(f"generate {field}", count, count - len(missing)) as bar:
        for done, (i, image) in enumerate(
            _draw_missing(model, group, prompts, missing), 1
        ):
            images[i] = image
            _save(paths[i], image, text)
            bar.update(count - len(missing) + done)
    return images


def _draw_missing(
    model, group: Any, prompts: Sequence[str], numbers: list[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (i, image i) of the numbers, drawn in batches of one size."""
    size = min(group.batch, _MAX_BATCH, len(numbers))
    how = group.generation
    fields = {f.name: getattr(how, f.name) for f in dataclasses.fields(how)}
    samples = Samples(**fields, batch=size)
    while numbers:
        first = numbers[0]
        batch = [prompts[i % len(prompts)] for i in range(first, first + size)]
        images = sampling_images.draw_images(model, batch, samples, first)
        yield from ((i, images[i - first]) for i in numbers if i < first + size)
        numbers = [i for i in numbers if i >= first + size]


def _save(path: pathlib.Path, image: np.ndarray, settings: str) -> None:
    """Writes an image, and settings.json beside it."""
    if jax.process_index():  # the first process alone writes, the others draw too
        return
    description = path.with_name("settings.json")
    try:
        with files.atomic_write(path) as aside:
            Image.fromarray(image).save(aside)
        if not description.exists():
            files.write(description, settings)
    except OSError as error:
        raise UserError(
            f"cache folder {path.parent} cannot be written ({error.strerror or error})"
            "; set GIFT_JAX_CACHE to a folder that can"
        ) from error
