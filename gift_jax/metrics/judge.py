# SPDX-License-Identifier: Apache-2.0
"""The judge of the embedded world: which of 480 concepts, in which of six styles?

A small CLIP that never saw a generated image, with the embeddings of all names. A
concept or style is recognized where its name is the nearest of all to the image.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from gift_jax.data import captions
from gift_jax.data.sources import emoji
from gift_jax.metrics import backbone as backbones
from gift_jax.metrics.backbone import Backbone, unit
from gift_jax.runtime.errors import UserError

FOLDER = backbones.JUDGE


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """The judge's backbone with the embeddings of every name.

    Attributes: concepts: "N" names; styles: "S" names. concept_ND, style_SD: unit
      vectors.
    """

    backbone: Backbone
    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    concept_ND: np.ndarray
    style_SD: np.ndarray

    @property
    def version(self) -> str:
        """Content hash of its files, to be printed with every number."""
        return self.backbone.version

    def name(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (concept ids, style ids), int "B", of uint8 "B H W 3" images."""
        x_BD = self.backbone.images(images)
        concept = np.argmax(x_BD @ self.concept_ND.T, axis=1)
        return concept, np.argmax(x_BD @ self.style_SD.T, axis=1)


@functools.lru_cache(maxsize=2)
def load(folder: pathlib.Path = FOLDER) -> Judge:
    """Returns the judge in a folder; loaded once.

    Args: folder: with the image tower; the model "emoji-sd" must be beside it, whose
      text encoder and tokenizer the judge shares.
    Raises: UserError if the folder or one of its files is missing or malformed.
    """
    if not folder.is_dir():
        raise UserError(f"judge={folder}: no such folder; it ships with the package")
    backbone = backbones.load("judge" if folder == FOLDER else str(folder))
    if backbone.kind != "judge":
        raise UserError(f"judge={folder}: is a {backbone.kind}, not a judge")
    concepts = tuple(sorted(emoji.all_concepts()))
    names = name_embeddings(backbone.texts, concepts, emoji.STYLES)
    return Judge(backbone, concepts, emoji.STYLES, names["concept"], names["style"])


def name_embeddings(
    embed: Callable[[Sequence[str]], np.ndarray],
    concepts: Sequence[str],
    styles: Sequence[str],
) -> dict[str, np.ndarray]:
    """Returns unit vectors for the names: {"concept": "N D", "style": "S D"}.

    Each is the mean over the templates that name only the concept, or only the style.

    Args: embed: captions -> float32 "B D", of any length.
    """

    def mean_of(templates, fill, names):
        stacked = [unit(embed([fill(t, name) for name in names])) for t in templates]
        return unit(np.mean(stacked, axis=0))

    return {
        "concept": mean_of(
            captions.CONCEPT_TEMPLATES, lambda t, c: captions.fill(t, c, ""), concepts
        ),
        "style": mean_of(
            captions.STYLE_TEMPLATES, lambda t, s: captions.fill(t, "", s), styles
        ),
    }
