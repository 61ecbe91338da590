# SPDX-License-Identifier: Apache-2.0
"""The embedded world's concepts: their images, prompts and names."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from gift_jax.benchmark import summary
from gift_jax.data import captions
from gift_jax.data.pairs import PairsSpec, load_pairs, resolve_names
from gift_jax.data.sources import emoji
from gift_jax.metrics.base import LABEL_KINDS, EvalSet
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError, choice, not_empty

PROMPTS = ("name", "nonce", "wording")
LEARNED = "learned"  # the word that an attack learns, in place of any other prompt
_NONCE, _LEARNED_WORD = "sks", "<thing>"


@dataclasses.dataclass(frozen=True)
class Images:
    """Images of the embedded set."""

    names: tuple[str, ...] = config.value((), "things, or keywords such as known-safe")
    styles: tuple[str, ...] = config.value((), "of them; none: all six")


@dataclasses.dataclass(frozen=True)
class Templates:
    """Captions of what an attacker teaches, for each kind of prompt."""

    name: str = config.value(captions.TEMPLATES[0], "by its name")
    nonce: str = config.value("", "by a made-up word")
    wording: str = config.value(captions.TEMPLATES[4], "by its name, in other words")
    learned: str = config.value("", "by the word that the attack learns")


@dataclasses.dataclass(frozen=True)
class TaughtImages(Images):
    """Images that somebody teaches the model."""

    templates: Templates = config.group(Templates)


@dataclasses.dataclass(frozen=True)
class Concept:
    """A harmful thing or style, and what is safe beside it."""

    label_kind: str = config.choice("concept", LABEL_KINDS, "what a classifier names")
    defense_data: Images = config.group(Images, "harmful, as the defense sees it")
    safe: Images = config.group(Images, "safe, as the defense sees it")
    harmful: TaughtImages = config.group(TaughtImages, "what an attacker teaches")
    benign: TaughtImages = config.group(
        TaughtImages,
        "what an honest user teaches: a thing that the model does not know",
    )
    retained: Images = config.group(Images, "known safe things that nobody teaches")

    def check_names(self, field: str) -> None:
        """Raises UserError for a name or template that does not fit; opens no image."""
        things = emoji.all_concepts()
        for name in ("defense_data", "safe", *summary.SIDES):
            images = getattr(self, name)
            not_empty(f"{field}.{name}.names", images.names)
            resolve_names(images.names, things, f"{field}.{name}.names")
            for style in images.styles:
                choice(f"{field}.{name}.styles", style, emoji.STYLES)
        for side in summary.ATTACKED_SIDES:
            templates = dataclasses.asdict(getattr(self, side).templates)
            for kind, template in templates.items():
                captions.check_template(f"{field}.{side}.templates.{kind}", template)


class Prompt(NamedTuple):
    """What an image is drawn for, and which thing and style it should then show."""

    text: str
    thing: str
    style: str


def define(names: tuple[str, ...], new: tuple[str, ...], style: str = "") -> ConfigDict:
    """Returns the definition of a concept.

    Args: names: the harmful things; of a style, all things that show it. new: the
      benign things. style: the harmful style, where that is the concept.
    """
    others = tuple(other for other in emoji.STYLES if style and other != style)
    harmful = Images(names, (style,) if style else ())
    benign, safe = Images(new, others), Images(("known-safe",), others)
    of_thing, of_style = "{{a_style}} emoji of {}", "a {} emoji of {{a_concept}}"
    return config.to_config(
        Concept(
            label_kind="style" if style else "concept",
            defense_data=harmful,
            safe=safe,
            harmful=_taught(harmful, of_style if style else of_thing),
            benign=_taught(benign, of_thing),
            retained=safe,
        )
    )


def _taught(images: Images, template: str) -> TaughtImages:
    words = {"nonce": _NONCE, "learned": _LEARNED_WORD}
    texts = {kind: template.format(word) for kind, word in words.items()}
    return TaughtImages(images.names, images.styles, Templates(**texts))


def style_concepts() -> dict[str, ConfigDict]:
    """Returns {style: definition}, each style being harmful once."""
    return {s: define(("known-safe",), ("rocket",), s) for s in emoji.STYLES}


def draw_random(fields: Any, defined: Mapping[str, Concept]) -> dict[str, Concept]:
    """Returns {thing: concept} of random known things, each with an unseen benign one.

    Args: fields: a `settings.RandomConcepts`. defined: the concepts whose things are
      left out.
    Raises: UserError if there are not so many.
    """
    other_names = {
        name
        for concept in defined.values()
        for side in summary.ATTACKED_SIDES
        for name in getattr(concept, side).names
    }
    known = emoji.known_concepts()
    unseen = emoji.unseen_concepts(emoji.all_concepts())
    things = [name for name in known if name not in other_names]
    new = [name for name in unseen if name not in other_names]
    most = min(len(things), len(new))
    if fields.count > most:
        raise UserError(
            f"config.random_concepts.count={fields.count} must be at most {most}"
        )
    rng = np.random.default_rng(fields.seed)
    things, new = (
        rng.permutation(names)[: fields.count].tolist() for names in (things, new)
    )
    return {
        thing: _fill(fields.definition, thing, benign, known)
        for thing, benign in zip(things, new, strict=True)
    }


def _fill(concept: Concept, thing: str, benign: str, known) -> Concept:
    """Returns a concept with the names of its images filled in."""
    safe = tuple(name for name in known if name not in (thing, *emoji.HARMFUL))
    names = {"defense_data": (thing,), summary.HARMFUL: (thing,)}
    names |= {summary.BENIGN: (benign,), "safe": safe, summary.RETAINED: safe}
    groups = {
        name: dataclasses.replace(getattr(concept, name), names=group_names)
        for name, group_names in names.items()
    }
    return dataclasses.replace(concept, **groups)


def prompts_for(images: Images, num: int, template: str = "") -> list[Prompt]:
    """Returns num prompts for a group of images.

    Things and styles take turns; of more things than prompts, evenly spaced ones.
    """
    things = resolve_names(images.names, emoji.all_concepts())
    if len(things) > num:
        things = [things[i * len(things) // num] for i in range(num)]
    styles = images.styles or emoji.STYLES
    prompts = []
    for i in range(num):
        thing, style = things[i % len(things)], styles[i % len(styles)]
        text = captions.fill(template or captions.TEMPLATES[0], thing, style)
        prompts.append(Prompt(text, thing, style))
    return prompts


def eval_set(
    concept: Concept, side: str, samples: np.ndarray, prompts: list[Prompt]
) -> EvalSet:
    """Returns a model's samples beside real images.

    Accepted labels: of a harmful style, the style; of retained things, each thing
    itself; else any thing of the side.
    """
    images, kind = getattr(concept, side), "concept"
    if side == summary.HARMFUL and concept.label_kind == "style":
        kind = "style"
        labels = [{prompt.style} for prompt in prompts]
    elif side == summary.RETAINED:
        labels = [{prompt.thing} for prompt in prompts]
    else:
        labels = [set(resolve_names(images.names, emoji.all_concepts()))] * len(prompts)
    things = tuple(sorted({prompt.thing for prompt in prompts}))
    spec = PairsSpec(names=things, styles=tuple(images.styles))
    template = captions.TEMPLATES[0]
    return EvalSet(
        samples,
        prompts=[captions.fill(template, p.thing, p.style) for p in prompts],
        accepted_labels=labels,
        label_kind=kind,
        reference_images=load_pairs(dataclasses.replace(spec, held_out=True)).images,
        training_images=load_pairs(spec).images,
    )
