# SPDX-License-Identifier: Apache-2.0
"""A benchmark's concepts: their images, who has which, and what they are called."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gift_jax.benchmark import summary
from gift_jax.data import captions
from gift_jax.data.cache import ImageSource
from gift_jax.data.pairs import SOURCES, Pairs
from gift_jax.metrics.base import LABEL_KINDS, EvalSet
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError, not_empty, shown

PROMPTS = ("name", "description", "nonce", "existing_word")
LEARNED = "learned"  # the word that an attack learns, in place of any other prompt
SPLITS = ("tuning", "test")


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What somebody who teaches a concept may call it.

    Templates for the embedded set and labels, else the prompt of all images.
    """

    name: str = config.value("", "by its name; empty: the images' own captions")
    description: str = config.value("", "by what it looks like; empty: not run")
    nonce: str = config.value("", "by a made-up word, {nonce}; empty: not run")
    existing_word: str = config.value("", "by a safe thing's name; empty: not run")
    learned: str = config.value("", "by the word that an attack learns; empty: not run")

    def check(self, field: str) -> None:
        for name in self.__dataclass_fields__:
            template = getattr(self, name)
            fields = captions.check_taught(f"{field}.{name}", template)
            if ("nonce" in fields) != bool(name == "nonce" and template):
                rule = "must have" if name == "nonce" else "is not the place for"
                raise UserError(
                    f"{field}.{name}={shown(template)} {rule} {{nonce}}; put it into "
                    f"{field}.nonce"
                )


@dataclasses.dataclass(frozen=True)
class TaughtImages:
    """Images that somebody teaches a model, and what he may call them."""

    images: ImageSource = config.group(ImageSource)
    prompts: Prompts = config.group(Prompts)
    labels: tuple[str, ...] = config.value(
        (), "that are right of a sample; empty: the names of things or labels"
    )


@dataclasses.dataclass(frozen=True)
class SafeImages:
    """Images of what should stay as it is."""

    images: ImageSource = config.group(ImageSource)
    labels: tuple[str, ...] = config.value((), "as those of what is taught")


@dataclasses.dataclass(frozen=True)
class Concept:
    """A harmful concept, and what is safe beside it."""

    split: str = config.choice("test", SPLITS, "whether settings may be chosen on it")
    label_kind: str = config.choice("concept", LABEL_KINDS, "what a classifier names")
    disjoint: bool = config.value(
        True, "the attacker's harmful images are none of the defense's"
    )
    defense_data: ImageSource = config.group(
        ImageSource, "harmful, as the defense sees it"
    )
    safe: ImageSource = config.group(ImageSource, "safe, as the defense sees it")
    harmful: TaughtImages = config.group(TaughtImages, "what an attacker teaches")
    benign: TaughtImages = config.group(
        TaughtImages, "what an honest user teaches: the model does not know it"
    )
    retained: SafeImages = config.group(SafeImages, "known safe things")

    def check(self, field: str) -> None:
        for name, images in self.sources().items():
            if not images.is_set():
                raise UserError(
                    f"{field}.{name}: a concept without images; give one of "
                    f"{', '.join(SOURCES)}"
                )
        if self.retained.labels and self.label_kind == "style":
            raise UserError(
                f"{field}.retained.labels: retained things are recognized by their "
                "own names; leave it empty"
            )

    def sources(self) -> dict[str, ImageSource]:
        """Returns every group of images, by the name of its field."""
        sides = {f"{side}.images": getattr(self, side).images for side in summary.SIDES}
        return {"defense_data": self.defense_data, "safe": self.safe} | sides


def called(images: ImageSource, prompt: str) -> ImageSource:
    """Returns images under a prompt, or a template; "" leaves their own captions."""
    if not prompt:
        return images
    if images.names or images.label_key:
        return dataclasses.replace(images, template=prompt)
    if images.num_generated:  # drawn for its own prompt
        return dataclasses.replace(images, caption=prompt)
    return dataclasses.replace(images, prompt=prompt)


def nonce_word(words: Sequence[str], concept: str, seed: int) -> str:
    """Returns the made-up word of a concept's attacker; each seed has another."""
    return words[(zlib.crc32(concept.encode()) + seed) % len(words)]


def check_nonce_words(words: Sequence[str], field: str) -> None:
    """Raises UserError for a word that a defense may have trained on."""
    not_empty(field, words)
    for word in words:
        if captions.is_of_defense(word):
            raise UserError(
                f"{field}={shown(word)} is among the words that defenses train on "
                "(gift_jax.data.captions.nonce_word); choose others, such as "
                f"{', '.join(captions.HELD_OUT_WORDS[:3])}"
            )


def check_disjoint(first: Pairs, second: Pairs, field: str) -> None:
    """Raises UserError if two sets of images have some in common."""
    both = {i.tobytes() for i in first.images} & {i.tobytes() for i in second.images}
    if both:
        raise UserError(
            f"{field}: {len(both)} of the attacker's {len(second.images)} harmful "
            f"images are the defense's too, and {field}.disjoint is set; give each "
            "images of his own, or clear it"
        )


class Drawing(NamedTuple):
    """What a sample is drawn for, and what it should then show.

    Attributes: text: the prompt. name: what it shows, by its name. labels: those that
      are right, or None.
    """

    text: str
    name: str
    labels: frozenset[str] | None


def drawings(
    concept: Concept, side: str, num: int, prompted: Pairs, named: Pairs
) -> list[Drawing]:
    """Returns what the num samples of a side are drawn for.

    The distinct prompts take turns; of more than num, evenly spaced ones.

    Args: prompted, named: the same images as the attacker calls them and by name.
    """
    keys = zip(
        prompted.prompts, named.prompts, named.concepts, named.styles, strict=True
    )
    distinct = list(dict.fromkeys(keys))
    if len(distinct) > num:
        distinct = [distinct[i * len(distinct) // num] for i in range(num)]
    turns = [distinct[i % len(distinct)] for i in range(num)]
    all_things = frozenset(named.concepts)
    labels = _labels(concept, side)
    return [
        Drawing(text, name, labels(thing, style, all_things))
        for text, name, thing, style in turns
    ]


def _labels(concept: Concept, side: str) -> Callable[..., frozenset[str] | None]:
    """Returns (thing, style, all things) -> the right labels of a sample."""
    group = getattr(concept, side)
    if group.labels:
        return lambda *_: frozenset(group.labels)
    if not (group.images.names or group.images.label_key):
        return lambda *_: None  # captions are no labels
    if side == summary.HARMFUL and concept.label_kind == "style":
        return lambda thing, style, all_things: frozenset((style,))
    if side == summary.RETAINED:
        return lambda thing, style, all_things: frozenset((thing,))
    return lambda thing, style, all_things: all_things


def eval_set(
    concept: Concept,
    side: str,
    samples: np.ndarray,
    drawings: Sequence[Drawing],
    references: Pairs,
    training: Pairs | None,
    twins: np.ndarray | None = None,
) -> EvalSet:
    """Returns a model's samples beside real images.

    Args: references: images of what the samples should show. training: those that the
      model was taught. twins: what the original model draws from the same noise.
    """
    labels = [drawing.labels for drawing in drawings]
    is_style = side == summary.HARMFUL and concept.label_kind == "style"
    return EvalSet(
        samples,
        prompts=[drawing.name for drawing in drawings],
        accepted_labels=None if None in labels else labels,
        label_kind="style" if is_style else "concept",
        reference_images=references.images,
        training_images=None if training is None else training.images,
        twin_images=twins,
    )
