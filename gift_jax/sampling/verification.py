# SPDX-License-Identifier: Apache-2.0
"""Whether PyTorch loads a model as its files have it, and draws the same picture."""

import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from gift_jax.models import load, weights
from gift_jax.models.folder import existing
from gift_jax.models.sd import pytorch
from gift_jax.models.sd.adapters import (
    AdapterFiles,
    embeddings,
    loras,
    read_lora,
)
from gift_jax.models.sd.single_file import cache
from gift_jax.runtime import processes
from gift_jax.runtime.errors import UserError, VerificationError
from gift_jax.sampling import sampler, schedules

_MAX_DIFFERENCE = 2  # of 255: what rounding does to a pixel


@dataclasses.dataclass(frozen=True)
class Picture:
    """What is drawn on both sides. prompt: "" is `PROMPT` with all added words."""

    prompt: str = ""
    steps: int = 2
    guidance: float = 4.0  # so that the unconditional prompt is drawn with, too
    seed: int = 0


PROMPT = "a photo of a dog"


def verify(
    model: str,
    added: AdapterFiles | None = None,
    *,
    revision: str = "",
    variant: str = "",
    picture: Picture | None = None,
    without: str = "",
    as_float32: bool = False,
) -> str:
    """Returns what was verified, one line.

    One side after the other is in memory, in float32, PyTorch's on the CPU.

    Args: model, revision, variant: see `load.load_model`. added: LoRA and textual
      inversion files. picture: None draws none; `without`: why, in words. as_float32:
      see `pytorch.load`.
    Raises: UserError if PyTorch or a file that is named is missing.
      VerificationError, of one line, if the two sides do not agree.
    """
    added = added or AdapterFiles()
    pytorch.check_installed("to verify a model", lora=bool(added.lora))
    files = loras(added), embeddings(added)
    root = existing(load.model_folder(model, revision, variant))
    path = Path(model).expanduser()
    single_file = path if cache.is_single_file(path) else None
    with pytorch.quiet(), _mistakes_as_failures(), _hushed():
        adapters = load.read_adapters(added, root, variant)
        pipe = pytorch.load(root, variant, single_file, as_float32=as_float32)
        line = _add(pipe, root, variant, files, adapters)
        if picture is None:
            return f"{line}; no picture{f': {without}' if without else ''}"
        theirs = _draw_theirs(pipe, root, adapters, picture)
        del pipe
        gc.collect()
        difference = _difference(_draw_ours(root, added, variant, picture), theirs)
    if difference > _MAX_DIFFERENCE:
        raise VerificationError(
            f"{model}: the pictures of gift_jax and PyTorch differ by {difference}/255 "
            f"(at most {_MAX_DIFFERENCE} is rounding; {pytorch.versions()})"
        )
    return f"{line}; pictures differ by at most {difference}/255"


def _add(pipe, root, variant, files, adapters) -> str:
    """Adds files to PyTorch's pipeline; returns the first half of the line.

    Args: files: (file, scale) of LoRA, (file, token) of textual inversions.
    """
    of_loras, of_words = files
    layers = [read_lora(str(file), root, variant) for file, _ in of_loras]
    pytorch.add_loras(pipe, of_loras, layers)
    pytorch.add_words(pipe, of_words, adapters.words)
    parts = [f"{len(weights.components(root))} components"]
    if layers:
        counts = " + ".join(str(len(of_file)) for of_file in layers)
        parts.append(f"{counts} LoRA layers")
    for token, rows in adapters.words.items():
        parts.append(f"{len(next(iter(rows.values())))} vectors of {token}")
    return f"verified: {' and '.join(parts)} load in {pytorch.versions()}"


def _draw_theirs(pipe, root, adapters, picture) -> np.ndarray:
    """Returns float32 "H W 3" in [0, 1]."""
    # sizes and noise, without the weights of this side
    model = load.abstract_model(str(root))
    return pytorch.draw(
        pipe,
        root,
        _prompt(picture, adapters),
        _noise(model.latent_shape, picture)[0],
        tuple(side * model.factor for side in model.latent_shape[1:]),
        steps=picture.steps,
        guidance=picture.guidance,
        with_ddim=bool(_scheduler(model, picture)),
    )


def _draw_ours(root, added, variant, picture) -> np.ndarray:
    """Returns uint8 "H W 3"."""
    model = load.load_model(str(root), variant=variant, added=added)
    prompt = _prompt(picture, model.adapters)
    with _full_precision():
        sample = sampler.make_sampler(
            model,
            scheduler=_scheduler(model, picture),
            steps=picture.steps,
            guidance=picture.guidance,
        )
        images = sample(
            model.denoiser_params,
            model.vae_params,
            model.encode_text([prompt]),
            model.encode_text([""]),
            _noise(model.latent_shape, picture),
        )
    return np.asarray(images)[0]


def _difference(ours: np.ndarray, theirs: np.ndarray) -> int:
    """Returns the largest difference of two pictures' pixels, of 255."""
    if ours.shape != theirs.shape or not np.isfinite(theirs).all():
        raise VerificationError(
            f"PyTorch draws {list(theirs.shape)} pixels, "
            f"{'all' if np.isfinite(theirs).all() else 'not all'} of them finite, and "
            f"gift_jax {list(ours.shape)}"
        )
    return int(np.abs(ours.astype(int) - np.round(255 * theirs)).max())


def _prompt(picture: Picture, adapters: Any) -> str:
    words = adapters.words if adapters else ()
    return picture.prompt or " ".join([PROMPT, *words])


def _noise(shape, picture: Picture) -> np.ndarray:
    key = jax.random.key(picture.seed)
    return np.asarray(sampler.initial_latents(key, 1, shape))


def _scheduler(model: Any, picture: Picture) -> str:
    """Returns "": the folder's own scheduler, or a plain one if that draws noise."""
    config = model.scheduler_config
    table = schedules.schedule(config, "", picture.steps)
    return schedules.first_order(config) if schedules.is_stochastic(table) else ""


def _full_precision():
    """Accelerators multiply float32 in fewer bits unless they are asked not to."""
    if jax.default_backend() == "cpu":
        return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")


@contextlib.contextmanager
def _mistakes_as_failures() -> Iterator[None]:
    try:
        yield
    except UserError as error:  # of what is in the files, which are there
        raise VerificationError(str(error)) from error


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    level = logging.get_verbosity()
    logging.set_verbosity(min(level, logging.WARNING))
    try:
        yield
    finally:
        logging.set_verbosity(level)


# --- at the end of a run --------------------------------------------------------------


def check_field(choice: str) -> None:
    """Raises UserError if a run is to be verified, and PyTorch is missing."""
    if choice == "on":
        pytorch.check_installed("config.verify=on")


def verify_run(run: Any, export: Path, added: AdapterFiles | None = None) -> None:
    """Verifies what a run has written, as its config's field `verify` says.

    "auto": if PyTorch is there; a failure is a warning. The picture of a large model
    is left out, since it takes minutes.

    Args: run: the checked config, with the fields that name its model. export: the
      model. added: the files to add to the run's model.
    Raises: VerificationError, for "on".
    """
    if run.verify == "off" or not processes.is_main_process():
        return
    if run.verify == "auto" and not pytorch.is_installed():
        return
    is_drawn = run.verify == "on" or load.weight_bytes(export) < load.SMALL_BYTES
    try:
        line = verify(
            str(export),
            variant=run.variant,
            picture=Picture() if is_drawn else None,
            without="the model is large; gift-jax convert verify draws one",
        )
        logging.info("export: %s", line)
        if added:
            line = verify(
                run.model,
                added,
                revision=run.revision,
                variant=run.variant,
                without="the export has the same",
                as_float32=True,  # the base model's configs are not of this run
            )
            logging.info("the files for the base model: %s", line)
    except (UserError, VerificationError) as error:
        if run.verify == "on":
            raise
        logging.warning("NOT VERIFIED, PyTorch will not use this as it is: %s", error)
