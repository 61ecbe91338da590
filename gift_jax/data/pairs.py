# SPDX-License-Identifier: Apache-2.0
"""The picture and prompt pairs that a method or an attack trains on.

They come from one of `SOURCES`: the embedded emoji set by name, a folder of pictures, a
dataset that tensorflow-datasets has prepared, or the model itself.
"""

import dataclasses
import difflib
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from gift_jax.data import captions
from gift_jax.data.images import CROPS, read_images
from gift_jax.data.sources import emoji, folder
from gift_jax.data.sources import tfds as tfds_source
from gift_jax.runtime.errors import UserError, at_least, choice, shown

KEYWORDS = ("all", "harmful", "known", "known-safe", "unseen")
SOURCES = ("names", "folder", "tfds", "num_generated")


@dataclasses.dataclass(frozen=True)
class PairsSpec:
    """Which pairs to use; exactly one of `SOURCES` is given.

    Attributes: names: concepts and `KEYWORDS`, mixed freely, of the embedded set.
      styles: those to use, empty for all six. template: a caption with {concept} or
      {a_concept}, for names and label_key; with names maybe {style} or {a_style} too.
      folder: pictures on disk, all under `prompt` or, with a metadata.csv or .jsonl,
      each under its text in `caption_column`. tfds: "name", "name:version" or
      "name/config:version" of a prepared dataset; split, image_key: what to read;
      caption_key, label_key or else `prompt`: what it is called; tfds_data_dir: where
      it lies, "" for the library's own place. num_generated: how many pictures the
      model draws for `prompt`.
      limit: use at most the first so many pictures, in the source's order; 0: all.
      crop: see `pictures.read`; the embedded pictures are square. size: side of the
      pictures, in pixels. held_out: True also uses the embedded pictures that
      pretraining left out. seed: of random crops. field: the config group to name in
      an error.
    """

    names: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    template: str = captions.TEMPLATES[0]
    folder: str = ""
    prompt: str = ""
    caption_column: str = "text"
    tfds: str = ""
    tfds_data_dir: str = ""
    split: str = "train"
    image_key: str = "image"
    caption_key: str = ""
    label_key: str = ""
    num_generated: int = 0
    limit: int = 0
    crop: str = "center"
    size: int = 64
    held_out: bool = False
    seed: int = 0
    field: str = "concepts"


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs in memory; entry i of every field describes the same picture.

    Attributes: images: uint8 "N H W 3". prompts: N captions. concepts, styles: N names
      (outside the embedded set the label or else the prompt, and ""). may_flip: bool
      "N", whether the mirror image would be as good.
    """

    images: np.ndarray
    prompts: list[str]
    concepts: list[str]
    styles: list[str]
    may_flip: np.ndarray

    def __len__(self):
        return len(self.images)

    @property
    def concept_names(self):
        """The distinct concepts, in order of appearance."""
        return tuple(dict.fromkeys(self.concepts))

    @property
    def concept_ids(self):
        """int32 "N", indices into `concept_names`."""
        ids = {name: i for i, name in enumerate(self.concept_names)}
        return np.asarray([ids[name] for name in self.concepts], np.int32)


def check_pairs(spec):
    """Returns which of `SOURCES` a `PairsSpec` uses; opens no picture.

    Raises: UserError for more or fewer than one source, a value out of range, a bad
      template, a missing folder, or prompts that are missing or given twice.
    """
    field = spec.field
    at_least(f"{field}.size", spec.size, 1)
    at_least(f"{field}.limit", spec.limit, 0)
    at_least(f"{field}.num_generated", spec.num_generated, 0)
    choice(f"{field}.crop", spec.crop, CROPS)
    given = [name for name in SOURCES if getattr(spec, name)]
    listed = f"{', '.join(SOURCES[:-1])} and {SOURCES[-1]}"
    if not given:
        raise UserError(f"{field}: give one of {listed}")
    if len(given) > 1:
        raise UserError(
            f"{field}: give only one of {listed}, not {' and '.join(given)}; clear "
            "the others"
        )
    (source,) = given
    for key in ("caption_key", "label_key"):
        if getattr(spec, key) and source != "tfds":
            raise UserError(f"{field}.{key} is for tfds, not for {source}; clear it")
    if source == "names":
        if spec.prompt:
            raise UserError(
                f"{field}.prompt is not for names; clear it, or write it as template"
            )
        _check_template(spec)
    elif source == "folder":
        folder.check(spec)
    elif source == "tfds":
        _check_tfds(spec)
    elif not spec.prompt.strip():
        raise UserError(f"{field}.prompt is empty; say what the model is to draw")
    return source


def load_pairs(spec, data=None, draw=None):
    """Returns the `Pairs` that a `PairsSpec` asks for.

    Args: data: an `emoji.Emoji` already in memory, else it is loaded when needed.
      draw: count -> uint8 "N H W 3", what the model draws for the prompt; needed for
      `num_generated` only.
    Raises: UserError as `check` does, for an unknown concept or style, and for
      pictures, captions or a dataset that cannot be read.
    """
    source = check_pairs(spec)
    if source == "names":
        return _from_emoji(spec, data if data is not None else emoji.load())
    if source == "folder":
        paths, prompts = folder.listing(spec)
        files = ((path, path) for path in paths)
        images = read_images(
            files, len(paths), spec.size, crop=spec.crop, seed=spec.seed
        )
        logging.info("read %d pictures from %s", len(images), spec.folder)
        names = prompts
    elif source == "tfds":
        images, prompts, names = tfds_source.read(spec)
    else:
        images = draw(min(spec.num_generated, spec.limit or spec.num_generated))
        images = _resized(images, spec.size)
        prompts = names = [spec.prompt] * len(images)
    return Pairs(
        images=images,
        prompts=prompts,
        concepts=names,
        styles=[""] * len(images),
        may_flip=np.ones(len(images), bool),
    )


def resolve_names(names, concepts, field="concepts"):
    """Returns the concepts that `names` stand for: keywords expanded, no repeats.

    Args: names: concepts and `KEYWORDS`. concepts: every name in the data.
    Raises: UserError for a name that is neither.
    """
    if isinstance(names, str):  # a tuple of letters would be a puzzling error
        names = (names,)
    known = emoji.known_concepts()
    expansion = {
        "all": tuple(concepts),
        "harmful": emoji.HARMFUL,
        "known": known,
        "known-safe": tuple(n for n in known if n not in emoji.HARMFUL),
        "unseen": emoji.unseen_concepts(concepts),
    }
    resolved = []
    for name in names:
        if name not in expansion and name not in concepts:
            raise _unknown(field, "concept", name, (*KEYWORDS, *concepts))
        resolved.extend(expansion.get(name, (name,)))
    return tuple(dict.fromkeys(resolved))


def _from_emoji(spec, data):
    names = resolve_names(spec.names, data.concepts, f"{spec.field}.names")
    styles = (spec.styles,) if isinstance(spec.styles, str) else spec.styles
    styles = tuple(styles) or data.styles
    for style in styles:
        if style not in data.styles:
            raise _unknown(f"{spec.field}.styles", "style", style, data.styles)
    style_ids = [data.styles.index(style) for style in styles]
    rows = []
    for name in names:
        mine = data.concept_ids == data.concepts.index(name)
        mine &= np.isin(data.style_ids, style_ids)
        if not spec.held_out:
            mine &= ~data.held_out
        if name in spec.names and not mine.any():  # asked for by its own name
            raise UserError(
                f"{spec.field}.names: every picture of {name!r} in {', '.join(styles)} "
                "is held out of training; add a style"
            )
        rows.extend(np.flatnonzero(mine))
    rows = rows[: spec.limit or None]
    chosen = [data.concepts[i] for i in data.concept_ids[rows]]
    drawn = [data.styles[i] for i in data.style_ids[rows]]
    if len(set(chosen)) > 1 and not _check_template(spec):
        logging.warning("%s.template calls every concept the same", spec.field)
    pairs_ = zip(chosen, drawn, strict=True)
    return Pairs(
        images=_resized(data.images[rows], spec.size),
        prompts=[captions.fill(spec.template, c, s) for c, s in pairs_],
        concepts=chosen,
        styles=drawn,
        may_flip=np.asarray([captions.may_flip(name) for name in chosen]),
    )


def _resized(images, size):
    if images.shape[1:3] == (size, size):
        return images
    whole = (Image.fromarray(image) for image in images)
    sized = [p.resize((size, size), Image.Resampling.LANCZOS) for p in whole]
    return np.stack([np.asarray(picture) for picture in sized])


def _check_template(spec):
    """Returns whether it names the concept; UserError for a bad one."""
    fields = captions.check(f"{spec.field}.template", spec.template)
    return bool(fields & captions.OF_CONCEPT)


def _check_tfds(spec):
    keys = ("caption_key", "label_key", "prompt")
    given = [key for key in keys if getattr(spec, key).strip()]
    if len(given) != 1:
        raise UserError(
            f"{spec.field}: tfds needs one of {', '.join(keys)}, not "
            f"{' and '.join(given) or 'none'}"
        )
    if spec.label_key:
        fields = captions.check(f"{spec.field}.template", spec.template)
        if fields & captions.OF_STYLE:
            raise UserError(
                f"{spec.field}.template={spec.template!r} has a style, which labels "
                "have not; try 'a photo of {a_concept}'"
            )


def _unknown(field, kind, name, choices):
    near = difflib.get_close_matches(str(name)[:99], choices, n=3, cutoff=0.6)
    if near:
        fix = "did you mean " + " or ".join(repr(choice) for choice in near) + "?"
    elif len(choices) <= 10:
        fix = "choose from " + ", ".join(choices)
    else:
        fix = f"one of {len(choices)} names or {', '.join(KEYWORDS)} is expected"
    return UserError(f"{field}: {kind} {shown(name)} is not in the data; {fix}")


# What a data group of a config says about its pairs.
_PAIRS = tuple(
    field.name
    for field in dataclasses.fields(PairsSpec)
    if field.name not in ("size", "held_out", "seed", "field")
)


def pairs_spec(spec: Any, field: str, **others) -> PairsSpec:
    values = {name: getattr(spec, name) for name in _PAIRS}
    for name in ("names", "styles"):
        values[name] = tuple(values[name])
    return PairsSpec(**values, **others, field=f"config.{field}")
