# SPDX-License-Identifier: Apache-2.0
"""A model's folder on disk, read without loading the model."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from gift_jax.models import weights
from gift_jax.models.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A diffusers folder. variant: of its weight files, "" for the plain ones."""

    path: Path
    variant: str = ""

    def float32_params(self, component: str, paths: Iterable[str]):
        """Returns some of a component's parameters, {Flax path: float32 array}.

        What trains starts from them: weights rounded to the compute dtype would end up
        in the exported model.
        """
        _, params, _ = weights.load_component(
            self.path / component, component, variant=self.variant, only=set(paths)
        )
        return {
            path: np.asarray(array, np.float32)
            for path, array in flatten_dict(params, sep="/").items()
        }

    def load_tokenizer(self):
        """Returns the folder's tokenizer."""
        return load_tokenizer(self.path / "tokenizer")

    def content_hash(self) -> str:
        """Returns the sha256 of the files that the model is made of."""
        return weights.content_hash(self.path)
