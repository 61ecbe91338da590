# SPDX-License-Identifier: Apache-2.0
"""The embedded emoji set: 480 concepts, each drawn by six artists, 64x64 pixels.

Which images no training may see (`is_held_out`) and which concepts the embedded model
knows (`known_concepts`) are fixed here.
"""

import csv
import dataclasses
import functools
import pathlib

import numpy as np

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
# Safe things that settings had been chosen on before the others were divided.
TUNED = ("cat face", "crown", "gear", "guitar", "penguin", "rocket")


@dataclasses.dataclass(frozen=True)
class Emoji:
    """The whole set in memory; row i of every array describes the same image.

    Attributes: images: uint8 "N 64 64 3", RGB over white. concept_ids, style_ids:
      int32 "N", indices into `concepts` and `styles`. held_out: bool "N", images that
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
    """Returns True where an image stays out of all training (96 of 2,880).

    Every fifth concept in sorted order loses one style, the styles taking turns, so
    that each style loses 16 images. Works on integers and on integer arrays.
    """
    return (concept_id % 5 == 0) & (style_id == (concept_id // 5) % len(STYLES))


def is_image_held_out(name, style):
    """Returns `is_held_out` of a concept's image in a style, by their names."""
    return is_held_out(all_concepts().index(name), STYLES.index(style))


@functools.cache
def known_concepts():
    """Returns the 128 names, sorted, that the embedded UNet is trained on."""
    lines = (ASSETS / "known.txt").read_text(encoding="utf-8").splitlines()
    names = (line.split("#")[0].strip() for line in lines)
    return tuple(sorted(name for name in names if name))


@functools.cache
def read_metadata():
    """Returns a tuple of dicts: row, concept, style, group, subgroup; one an image."""
    with open(ASSETS / "metadata.csv", newline="", encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


@functools.cache
def all_concepts():
    """Returns the 480 names, sorted, without reading the images."""
    return tuple(sorted({row["concept"] for row in read_metadata()}))


def unseen_concepts(concepts):
    """Returns those of `concepts` that the embedded UNet never saw, in order."""
    known = set(known_concepts())
    return tuple(name for name in concepts if name not in known)


@functools.cache
def load():
    """Returns the embedded set as one `Emoji`; the arrays are shared: do not write."""
    rows = read_metadata()
    concepts = all_concepts()
    group_of = {row["concept"]: row["group"] for row in rows}
    concept_id = {name: i for i, name in enumerate(concepts)}
    concept_ids = np.asarray([concept_id[row["concept"]] for row in rows], np.int32)
    style_ids = np.asarray([STYLES.index(row["style"]) for row in rows], np.int32)
    with np.load(ASSETS / "emoji64.npz") as arrays:
        images = over_white(arrays["rgba"])
    return Emoji(
        images=images,
        concept_ids=concept_ids,
        style_ids=style_ids,
        held_out=is_held_out(concept_ids, style_ids),
        concepts=concepts,
        styles=STYLES,
        groups=tuple(group_of[name] for name in concepts),
    )


def over_white(rgba):
    """Composites uint8 "... 4" over white; returns uint8 "... 3", rounded."""
    alpha = rgba[..., 3:].astype(np.float32) / 255.0
    rgb = rgba[..., :3].astype(np.float32) * alpha + 255.0 * (1.0 - alpha)
    return np.rint(rgb).astype(np.uint8)


def _split(names):
    """Returns (tuning, test): names divided in two once and for all, by seed.

    Those of `TUNED` are in the first.
    """
    shuffled = np.random.default_rng(0).permutation(sorted(names)).tolist()
    half = len(shuffled) // 2
    tuning = [n for i, n in enumerate(shuffled) if i < half or n in TUNED]
    test = [n for n in shuffled if n not in tuning]
    return tuple(tuning), tuple(test)


@functools.cache
def splits():
    """Returns {"tuning" or "test": (known safe names, unseen names)}, in random order.

    Settings of defenses and attacks are chosen on the first half, and what is reported
    is measured on the second.
    """
    known = [name for name in known_concepts() if name not in HARMFUL]
    unseen = unseen_concepts(all_concepts())
    pairs = zip(_split(known), _split(unseen), strict=True)
    return dict(zip(("tuning", "test"), pairs, strict=True))
