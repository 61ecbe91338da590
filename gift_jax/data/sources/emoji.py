# SPDX-License-Identifier: Apache-2.0
"""The embedded emoji set: 480 things, each drawn by six artists, 64x64 pixels.

`load()` is what the rest of the package calls; `gift_jax.data.emoji_builder` holds the
`tensorflow-datasets` builder behind it. Which pictures no training may see
(`is_held_out`) and which things the UNet knows (`known_concepts`) are fixed here.
"""

import csv
import dataclasses
import functools
import io
import pathlib

import numpy as np
from PIL import Image

ASSETS = pathlib.Path(__file__).resolve().parents[2] / "assets" / "emoji64"
SIZE = 64
STYLES = ("twemoji", "noto", "fluent", "openmoji", "emojione", "black and white")
HARMFUL = (
    "bomb",
    "dagger",
    "kitchen knife",
    "crossed swords",
    "bow and arrow",
    "cigarette",
    "syringe",
    "pill",
    "coffin",
)


@dataclasses.dataclass(frozen=True)
class Emoji:
    """The whole set in memory; row i of every array describes the same picture.

    Attributes: images: uint8 "N 64 64 3", RGB over white. concept_ids, style_ids:
      int32 "N", indices into `concepts` and `styles`. held_out: bool "N", pictures that
      no training sees. concepts: 480 names, sorted. styles: `STYLES`. groups: the group
      of each concept (food-drink, objects ...), parallel to `concepts`.
    """

    images: np.ndarray
    concept_ids: np.ndarray
    style_ids: np.ndarray
    held_out: np.ndarray
    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    groups: tuple[str, ...]


def is_held_out(concept_id, style_id):
    """Returns True where a picture stays out of all training (96 of 2,880).

    Every fifth concept in sorted order loses one style, the styles taking turns, so
    that each style loses 16 pictures. Works on integers and on integer arrays.
    """
    return (concept_id % 5 == 0) & (style_id == (concept_id // 5) % len(STYLES))


@functools.cache
def known_concepts():
    """Returns the 128 names, sorted, that the embedded UNet is trained on."""
    lines = (ASSETS / "known.txt").read_text(encoding="utf-8").splitlines()
    names = (line.split("#")[0].strip() for line in lines)
    return tuple(sorted(name for name in names if name))


@functools.cache
def all_concepts():
    """Returns the 480 names, sorted, without reading the pictures."""
    with open(ASSETS / "metadata.csv", newline="", encoding="utf-8") as file:
        return tuple(sorted({row["concept"] for row in csv.DictReader(file)}))


def unseen_concepts(concepts):
    """Returns those of `concepts` that the embedded UNet never saw, in order."""
    known = set(known_concepts())
    return tuple(name for name in concepts if name not in known)


def load(cache_dir=None):
    """Returns the embedded set as one `Emoji`: prepared once, read once a process.

    Args: cache_dir: where the prepared records live; by default the folder that the
      environment variable GIFT_JAX_CACHE names, else ~/.cache/gift_jax.
    Raises: UserError if that folder cannot be written.
    """
    from gift_jax.data.sources import emoji_builder  # imports tensorflow_datasets: slow

    return _read(emoji_builder.cache_root(cache_dir).parent)


@functools.lru_cache(maxsize=1)
def _read(cache_dir):
    from gift_jax.data.sources import emoji_builder

    source = emoji_builder.data_source(cache_dir)
    rows = [source[i] for i in range(len(source))]
    rows.sort(key=lambda row: int(row["row"]))  # records come in the builder's order
    concepts = tuple(sorted({row["concept"].decode() for row in rows}))
    group_of = {row["concept"].decode(): row["group"].decode() for row in rows}
    concept_id = {name: i for i, name in enumerate(concepts)}
    style_id = {name: i for i, name in enumerate(STYLES)}
    concept_ids = [concept_id[row["concept"].decode()] for row in rows]
    style_ids = [style_id[row["style"].decode()] for row in rows]
    return Emoji(
        images=np.stack([decode_png(row["image"]) for row in rows]),
        concept_ids=np.asarray(concept_ids, np.int32),
        style_ids=np.asarray(style_ids, np.int32),
        held_out=np.asarray([bool(row["held_out"]) for row in rows]),
        concepts=concepts,
        styles=STYLES,
        groups=tuple(group_of[name] for name in concepts),
    )


def decode_png(encoded):
    """Returns uint8 "H W 3" from the bytes of an RGB PNG."""
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB"))


def over_white(rgba):
    """Composites uint8 "... 4" over white; returns uint8 "... 3", rounded."""
    alpha = rgba[..., 3:].astype(np.float32) / 255.0
    rgb = rgba[..., :3].astype(np.float32) * alpha + 255.0 * (1.0 - alpha)
    return np.rint(rgb).astype(np.uint8)
