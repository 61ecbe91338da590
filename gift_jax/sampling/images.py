# SPDX-License-Identifier: Apache-2.0
"""What a model draws: uncurated samples, their grids, and pictures to train on."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from gift_jax.data.images import read_image
from gift_jax.data.pairs import Pairs, load_pairs, pairs_spec
from gift_jax.models import weights
from gift_jax.models.sd import stable_diffusion
from gift_jax.runtime import config, files, progress
from gift_jax.runtime.errors import UserError, not_empty
from gift_jax.sampling import grid, sampler


@dataclasses.dataclass(frozen=True)
class Samples:
    """The fields of the images that a run draws of its model."""

    prompts: tuple[str, ...] = config.value((), "a row of the grid each")
    num: int = config.number(8, low=0, doc="images a prompt; 0: none")
    seed: int = config.number(1, low=0, doc="of the noise")
    guidance: float = config.number(7.5, low=1, doc="scale; 1: none")
    steps: int = config.number(25, low=1, doc="of the sampler")
    batch: int = config.number(4, low=1, doc="images drawn at once")

    def check(self, field: str) -> None:
        if self.num:
            not_empty(f"{field}.prompts", self.prompts)


_DRAWN_AT_ONCE = 8  # at most, of the pictures that a data group generates


def check_samples(model: stable_diffusion.StableDiffusion, samples: Any) -> None:
    """Raises UserError if the model's scheduler has not as many steps as asked for."""
    if samples.num:
        check_steps(model, "config.samples.steps", samples.steps)


def check_steps(model, field: str, steps: int) -> None:
    limit = stable_diffusion.noise_schedule(model).shape[0]
    if steps > limit:
        raise UserError(
            f"{field}={steps} must be at most {limit}, the model's training timesteps"
        )


def draw_images(
    model, unet_params, prompts: Sequence[str], cfg, number: int = 0
) -> np.ndarray:
    """Returns one picture a prompt, uint8 "N H W 3"; picture i draws its own noise.

    Args: cfg: seed, guidance, steps, batch (pictures at once). number: i of the first.
    """
    text = stable_diffusion.encode_prompts(model, list(dict.fromkeys(prompts)))
    row = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return sampler.draw(
        model,
        unet_params,
        np.asarray(text)[[row[prompt] for prompt in prompts]],
        stable_diffusion.encode_prompts(model, [""]),
        jax.random.key(cfg.seed),
        number + np.arange(len(prompts)),
        cfg.batch,
        steps=cfg.steps,
        guidance=cfg.guidance,
    )


def save_image_grid(model, unet_params, prompts, cfg, path: pathlib.Path) -> None:
    """Writes a PNG with cfg.num pictures a prompt, a row each."""
    every = [prompt for prompt in prompts for _ in range(cfg.num)]
    images = draw_images(model, unet_params, every, cfg)
    rows = images.reshape(len(prompts), cfg.num, *images.shape[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save_grid(list(rows), path, row_labels=list(prompts))
    logging.info("samples: %s", path)


def generate_images(model, spec: Any, field: str, count: int) -> np.ndarray:
    """Returns uint8 "N H W 3": `count` pictures that the model draws for a prompt.

    They are kept in the cache folder, under a name made of all that they depend on:
    drawn once, and an interrupted run goes on where it was. Picture i depends on the
    seed and i alone.

    Args: spec: prompt, generation.{seed,steps,guidance} and batch (how
      many at once, at most 8). field: the group's name.
    Raises: UserError if the steps are more than the model has, or the cache folder
      cannot be written.
    """
    check_steps(model, f"config.{field}.generation.steps", spec.generation.steps)
    settings = {
        "model_sha256": weights.content_hash(model.path),
        "variant": model.variant,
        "prompt": spec.prompt,
        "seed": spec.generation.seed,
        "steps": spec.generation.steps,
        "guidance": float(spec.generation.guidance),
        "dtype": jnp.dtype(model.unet.dtype).name,
        "size": model.image_size,
    }
    text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
    name = hashlib.sha256(text.encode()).hexdigest()
    folder = files.cache_folder() / "generated" / name
    paths = [folder / f"{i:05d}.png" for i in range(count)]
    missing = {i: path for i, path in enumerate(paths) if not path.exists()}
    images = np.empty((count, model.image_size, model.image_size, 3), np.uint8)
    for i, path in enumerate(paths):
        if i not in missing:
            images[i] = read_image(path, model.image_size)
    logging.info(
        "%s: the model draws %d of %d pictures of %r, kept in %s",
        field,
        len(missing),
        count,
        spec.prompt,
        folder,
    )
    with progress.bar(f"generate {field}", count, count - len(missing)) as bar:
        for i, image in _drawn(model, spec, list(missing)):
            images[i] = image
            _keep(missing.pop(i), image, text)
            bar.update(count - len(missing))
    return images


def _drawn(model, spec: Any, numbers: list[int]):
    """Yields (i, picture i) of the numbers, drawn in batches."""
    size = min(spec.batch, _DRAWN_AT_ONCE, len(numbers))
    how = ConfigDict(
        {
            "seed": spec.generation.seed,
            "steps": spec.generation.steps,
            "guidance": spec.generation.guidance,
            "batch": size,
        }
    )
    while numbers:
        first = numbers[0]
        prompts = [spec.prompt] * size
        images = draw_images(model, model.params["unet"], prompts, how, first)
        yield from ((i, images[i - first]) for i in numbers if i < first + size)
        numbers = [i for i in numbers if i >= first + size]


def _keep(path: pathlib.Path, image: np.ndarray, settings: str) -> None:
    """Writes a picture, and settings.json beside it, aside and renames them."""
    if jax.process_index():  # the first process alone writes, the others draw too
        return
    about = path.with_name("settings.json")
    try:
        with files.atomic_write(path) as aside:
            Image.fromarray(image).save(aside)
        if not about.exists():
            files.write(about, settings)
    except OSError as error:
        raise UserError(
            f"cache folder {path.parent} cannot be written ({error.strerror or error})"
            "; set GIFT_JAX_CACHE to a folder that can"
        ) from error


def read_pairs(model, spec: Any, field: str, size: int, seed: int = 0) -> Pairs:
    """Returns the pictures and prompts that one group of config fields asks for.

    Args: model: draws the pictures of `generate`; the other sources do not use it.
      spec: the group, see `concepts.PairsSpec` and `samples.generated`. field: its
      name. size: side in pixels of the pictures. seed: of random crops.
    Raises: UserError naming the field or file.
    """
    return load_pairs(
        pairs_spec(spec, field, size=size, seed=seed),
        draw=lambda count: generate_images(model, spec, field, count),
    )
