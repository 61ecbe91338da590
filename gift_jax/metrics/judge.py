# SPDX-License-Identifier: Apache-2.0
"""The judge of the embedded world: which of 480 things, in which of six styles?

A small CLIP that never saw a generated picture. A thing or style is recognised where
its name's embedding is the nearest of all names to the picture's.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gift_jax.data import captions
from gift_jax.data.sources import emoji
from gift_jax.models import vision, weights
from gift_jax.models.tokenizer import load_tokenizer
from gift_jax.runtime.errors import UserError

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "assets" / "judge"
BATCH = 96


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """A CLIP with the embeddings of every name.

    Attributes: concepts: "N" names; styles: "S" names. concept_ND, style_SD: unit
      vectors. embed_images: float32 "B H W 3" in [-1, 1] -> unit "B D". version:
      content hash of its files, to be printed with every number.
    """

    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    concept_ND: np.ndarray
    style_SD: np.ndarray
    embed_images: Callable[[np.ndarray], np.ndarray]
    version: str

    def name(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (concept ids, style ids), int "B", of uint8 "B H W 3" pictures."""
        x_BD = self.embed(images)
        concept = np.argmax(x_BD @ self.concept_ND.T, axis=1)
        return concept, np.argmax(x_BD @ self.style_SD.T, axis=1)

    def embed(self, images: np.ndarray) -> np.ndarray:
        """Returns unit vectors, float32 "B D", of uint8 "B H W 3" pictures."""
        parts = []
        for first in range(0, len(images), BATCH):
            rows = np.minimum(np.arange(first, first + BATCH), len(images) - 1)
            x_BHWC = images[rows].astype(np.float32) / 127.5 - 1.0
            with jax.default_matmul_precision("highest"):  # as the panel's metrics
                parts.append(np.asarray(self.embed_images(x_BHWC)))
        return np.concatenate(parts)[: len(images)]

    def recognition(self, images: np.ndarray, concept: str) -> float:
        """Returns the share of pictures whose thing the judge names `concept`."""
        named, _ = self.name(images)
        return float(np.mean(named == self.concepts.index(concept)))


@functools.lru_cache(maxsize=2)
def load(folder: pathlib.Path = FOLDER) -> Judge:
    """Returns the judge in a CLIPModel folder with its tokenizer; loaded once.

    Raises: UserError if the folder or one of its files is missing or malformed.
    """
    if not folder.is_dir():
        raise UserError(f"judge={folder}: no such folder; it ships with the package")
    clip, params, _ = weights.load_component(folder, "clip")
    params = jax.tree.map(jnp.asarray, params)
    tokenizer = load_tokenizer(folder)
    project = jax.jit(lambda p, ids: vision.apply_clip_text(clip, p, ids))
    image = jax.jit(lambda p, x_BHWC: _embed_images(clip, p, x_BHWC))

    def embed(texts):
        ids = tokenizer(list(texts), padding="max_length", truncation=True).input_ids
        return np.asarray(project(params, np.asarray(ids, np.int32)))

    concepts = tuple(sorted(emoji.all_concepts()))
    names = name_embeddings(embed, concepts, emoji.STYLES)
    return Judge(
        concepts,
        emoji.STYLES,
        names["concept"],
        names["style"],
        lambda x_BHWC: image(params, x_BHWC),
        weights.content_hash(folder)[:12],
    )


def name_embeddings(
    embed: Callable[[Sequence[str]], np.ndarray],
    concepts: Sequence[str],
    styles: Sequence[str],
) -> dict[str, np.ndarray]:
    """Returns unit vectors for the names: {"concept": "N D", "style": "S D"}.

    Each is the mean over the templates that name only the concept, or only the style.

    Args: embed: captions -> float32 "B D", not normalised.
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


def unit(x_BD: np.ndarray) -> np.ndarray:
    """Returns the vectors at length 1."""
    return x_BD / np.linalg.norm(x_BD, axis=-1, keepdims=True)


def _embed_images(clip, params, x_BHWC):
    x_BD = vision.apply_clip_image(clip, params, jnp.transpose(x_BHWC, (0, 3, 1, 2)))
    return x_BD / jnp.linalg.norm(x_BD, axis=-1, keepdims=True)
