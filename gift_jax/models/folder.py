# SPDX-License-Identifier: Apache-2.0
"""A model's folder on disk, read without loading the model."""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict

from gift_jax.models import safetensors_io, weights
from gift_jax.models.kinds import kind_of
from gift_jax.models.tokenizer import load_tokenizer
from gift_jax.runtime.errors import UserError, shown


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A diffusers folder, with the files from elsewhere that are added to it.

    Attributes: variant: of its weight files, "" for the plain ones. adapters: None, or
      the added files; see `sd.adapters.Adapters`.
    """

    path: Path
    variant: str = ""
    adapters: Any = None

    @property
    def denoiser_component(self) -> str:
        """The name of the component that is the denoiser."""
        return weights.denoiser_of(self.path)

    def float32_params(self, component: str, paths: Iterable[str]):
        """Returns some of a component's parameters, {Flax path: float32 array}.

        What trains starts from them: weights rounded to the compute dtype would end up
        in the exported model.
        """
        _, params, _ = weights.load_component(
            self.path / component,
            kind_of(self.path, component),
            variant=self.variant,
            only=set(paths),
        )
        arrays = {
            path: np.asarray(array, np.float32)
            for path, array in flatten_dict(params, sep="/").items()
        }
        if self.adapters:
            arrays = {
                path: self.adapters.apply(weights.joined_path(component, path), a)
                for path, a in arrays.items()
            }
        return arrays

    def adapted_params(self):
        """Returns {Flax path: float32 array} of what added files change."""
        arrays = {}
        for component in weights.components(self.path) if self.adapters else ():
            if paths := self.adapters.paths(component):
                changed = self.float32_params(component, paths)
                arrays |= {
                    weights.joined_path(component, path): a
                    for path, a in changed.items()
                }
        return arrays

    def load_tokenizer(self):
        """Returns the folder's tokenizer, with the words of added files."""
        tokenizer = load_tokenizer(self.path / "tokenizer")
        if self.adapters:
            self.adapters.add_words(tokenizer)
        return tokenizer

    def added_tokenizer(self):
        """Returns the tokenizer if added files have words for it, else None."""
        return self.load_tokenizer() if self.adapters and self.adapters.words else None

    def added_files(self) -> tuple[str, ...]:
        """Returns what a model card says of the added files."""
        return self.adapters.descriptions() if self.adapters else ()

    def content_hash(self) -> str:
        """Returns the sha256 of the files that the model is made of."""
        own = weights.content_hash(self.path)
        return self.adapters.content_hash(own) if self.adapters else own


def existing(path) -> Path:
    """Returns the path of a model folder; UserError if it is none."""
    label = f"model={shown(str(path))}"
    if os.path.isfile(path):  # unlike pathlib's, of any name
        raise UserError(
            f"{label} is a file; must be a diffusers folder with model_index.json, or "
            "a whole model's .safetensors. To make a folder of a pickle (.ckpt), use "
            "diffusers: StableDiffusionPipeline.from_single_file(FILE)"
            ".save_pretrained(FOLDER)"
        )
    if not os.path.isdir(path):
        raise UserError(
            f"{label}: no such folder; must be a diffusers folder, or a hub id such as "
            "org/name"
        )
    return Path(path)


def class_names(root: Path) -> dict[str, str]:
    """Returns {component: name of its class} of model_index.json, null ones left out.

    Raises: UserError if the file is damaged.
    """
    file = root / "model_index.json"
    names = {}
    for name, value in safetensors_io.read_json(file).items():
        if isinstance(value, list) and not name.startswith("_") and any(value):
            if len(value) != 2 or not all(isinstance(part, str) for part in value):
                raise UserError(
                    f"{file}: {shown(name)} is {shown(value)}; must be a list of a "
                    "library and a class"
                )
            names[name] = value[1]
    return names


def pipeline(root: Path) -> str:
    """Returns the name of the pipeline's class in model_index.json, "" if none."""
    file = root / "model_index.json"
    name = safetensors_io.read_json(file).get("_class_name", "")
    if not isinstance(name, str):
        raise UserError(
            f"{file}: _class_name={shown(name)}; must be the name of a pipeline "
            "of diffusers (custom ones are not run)"
        )
    return name


def read_scheduler(path) -> dict[str, Any]:
    """Returns a folder's scheduler_config.json, of the class that diffusers loads."""
    root = existing(path)
    config = safetensors_io.read_json(root / "scheduler" / "scheduler_config.json")
    loaded = class_names(root).get("scheduler")
    if loaded is None:
        return config
    written = config.get("_class_name", loaded)
    if written != loaded:
        logging.info(
            "scheduler: %s, as model_index.json says; its file is of %s",
            loaded,
            written,
        )
    return config | {"_class_name": loaded}
