# SPDX-License-Identifier: Apache-2.0
"""The (image, prompt) pairs that a defense or an attack trains on.

They come from one of `SOURCES`: the embedded emoji set by name, a folder of images, a
dataset that tensorflow-datasets has prepared, or the model itself.
"""

import dataclasses
import difflib
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from gift_jax.data import captions
from gift_jax.data.images import CROPS, read_framed, whole_frames
from gift_jax.data.sources import emoji, folder
from gift_jax.data.sources import tfds as tfds_source
from gift_jax.runtime.errors import UserError, at_least, choice, shown

KEYWORDS = ("all", "harmful", "known", "known-safe", "unseen")
SOURCES = ("names", "folder", "tfds", "num_generated")


@dataclasses.dataclass(frozen=True)
class PairsSpec:
    """Which pairs to use; exactly one of `SOURCES` is set.

    Attributes: names: concepts and `KEYWORDS`, mixed freely, of the embedded set.
      styles: those to use, empty for all six. template: a caption with {concept} or
      {a_concept}, for names and label_key; with names optionally {style} or {a_style}.
      folder: images on disk, all under `prompt` or each under its captions, see
      `sources.layout`; of metadata those in `caption_column`. Several folders are a
      JSON list, whose prompts may be one too. tfds: "name", "name:version" or
      "name/config:version" of a prepared dataset; tfds_data_dir: where it is, "" for
      the library's own place; split, image_key: what to read; caption_key, label_key
      or else `prompt`: what an image is called. num_generated: how many images the
      model draws for `prompt`; caption: what these are then called, "" the prompt.
      limit: use at most this many images, the first in the source's order; 0: all.
      crop: see `images.read_image`; the embedded images are square. size: side of the
      images, in pixels. held_out: True also uses the embedded images that pretraining
      left out. seed: of random crops. captions_optional: the prompts of a folder
      without any are "". field: the config group to name in an error.
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
    caption: str = ""
    limit: int = 0
    crop: str = "center"
    size: int = 64
    held_out: bool = False
    seed: int = 0
    captions_optional: bool = False
    field: str = "concepts"


# what no config group has
_OF_CALLER = ("size", "held_out", "seed", "captions_optional", "field")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs in memory; entry i of every field describes the same image.

    Attributes: images: uint8 "N H W 3". prompts: N captions. concepts, styles: N names
      (outside the embedded set the label or else the prompt, and ""). may_flip: bool
      "N", whether the mirror image would be as good. captions: N tuples of one caption
      or more, whose first is the prompt; None: of that one each. frames: int32 "N 4",
      see `images.read_framed`; None: of images that are whole.
    """

    images: np.ndarray
    prompts: list[str]
    concepts: list[str]
    styles: list[str]
    may_flip: np.ndarray
    captions: list[tuple[str, ...]] | None = None
    frames: np.ndarray | None = None

    def __post_init__(self):
        if self.frames is None:
            object.__setattr__(self, "frames", whole_frames(self.images))

    def __len__(self):
        return len(self.images)

    @property
    def every_caption(self):
        """The distinct captions of all images, in order of appearance."""
        captions = self.captions or [(prompt,) for prompt in self.prompts]
        return list(dict.fromkeys(text for texts in captions for text in texts))

    @property
    def concept_names(self):
        """The distinct concepts, in order of appearance."""
        return tuple(dict.fromkeys(self.concepts))

    @property
    def concept_ids(self):
        """int32 "N", indices into `concept_names`."""
        ids = {name: i for i, name in enumerate(self.concept_names)}
        return np.asarray([ids[name] for name in self.concepts], np.int32)


def without(pairs: Pairs, others: Pairs) -> Pairs:
    """Returns the pairs that show no concept in a style of which others have one."""
    other_looks = set(zip(others.concepts, others.styles, strict=True))
    looks = zip(pairs.concepts, pairs.styles, strict=True)
    rows = [row for row, look in enumerate(looks) if look not in other_looks]
    return Pairs(
        images=pairs.images[rows],
        prompts=[pairs.prompts[row] for row in rows],
        concepts=[pairs.concepts[row] for row in rows],
        styles=[pairs.styles[row] for row in rows],
        may_flip=pairs.may_flip[rows],
        captions=[pairs.captions[row] for row in rows] if pairs.captions else None,
        frames=pairs.frames[rows],
    )


def join(first: Pairs, second: Pairs) -> Pairs:
    """Returns the pairs of both, in this order."""

    def every_caption(pairs):
        return pairs.captions or [(prompt,) for prompt in pairs.prompts]

    several = first.captions or second.captions
    return Pairs(
        images=np.concatenate([first.images, second.images]),
        prompts=[*first.prompts, *second.prompts],
        concepts=[*first.concepts, *second.concepts],
        styles=[*first.styles, *second.styles],
        may_flip=np.concatenate([first.may_flip, second.may_flip]),
        captions=every_caption(first) + every_caption(second) if several else None,
        frames=np.concatenate([first.frames, second.frames]),
    )


def pairs_spec(group: Any, field: str, **others) -> PairsSpec:
    """Returns the `PairsSpec` of a config's data group, which is called `field`."""
    names = [f.name for f in dataclasses.fields(PairsSpec) if f.name not in _OF_CALLER]
    values = {name: getattr(group, name) for name in names}
    for name in ("names", "styles"):
        values[name] = tuple(values[name])
    return PairsSpec(**values, **others, field=f"config.{field}")


def check_pairs(spec: PairsSpec) -> str:
    """Returns which of `SOURCES` a spec uses; opens no image.

    Raises: UserError for more or fewer than one source, a value out of range, a bad
      template, a missing folder, or prompts that are missing or given twice.
    """
    field = spec.field
    at_least(f"{field}.size", spec.size, 1)
    at_least(f"{field}.limit", spec.limit, 0)
    at_least(f"{field}.num_generated", spec.num_generated, 0)
    choice(f"{field}.crop", spec.crop, CROPS)
    source = _source(spec)
    for key in ("caption_key", "label_key"):
        if getattr(spec, key) and source != "tfds":
            raise UserError(f"{field}.{key} is for tfds, not for {source}; clear it")
    if spec.caption and source != "num_generated":
        raise UserError(
            f"{field}.caption is for num_generated, not for {source}; clear it"
        )
    if source == "names":
        if spec.prompt:
            raise UserError(
                f"{field}.prompt is not for names; clear it, or write it as template"
            )
        _check_template(spec)
        resolve_names(spec.names, emoji.all_concepts(), f"{field}.names")
        _check_styles(spec)
    elif source == "folder":
        folder.check(spec)
    elif source == "tfds":
        _check_tfds(spec)
    elif not spec.prompt.strip():
        raise UserError(f"{field}.prompt is empty; say what the model is to draw")
    return source


def load_pairs(spec: PairsSpec, draw=None) -> Pairs:
    """Returns the pairs that a spec asks for.

    Args: draw: count -> uint8 "N H W 3", what the model draws for the prompt; needed
      for `num_generated` only.
    Raises: UserError as `check_pairs` does, for an unknown concept or style, and for
      images, captions or a dataset that cannot be read.
    """
    source, several, frames = check_pairs(spec), None, None
    if source == "names":
        return _load_emoji(spec, emoji.load())
    if source == "folder":
        paths, several = folder.list_images(spec)
        files = ((path, path) for path in paths)
        images, frames = read_framed(
            files, len(paths), spec.size, crop=spec.crop, seed=spec.seed
        )
        logging.info("read %d images from %s", len(images), spec.folder)
        prompts = concepts = [texts[0] for texts in several]
    elif source == "tfds":
        images, frames, prompts, concepts = tfds_source.read(spec)
    else:
        images = draw(min(spec.num_generated, spec.limit or spec.num_generated))
        images = _resize(images, spec.size)
        concepts = [spec.prompt] * len(images)
        prompts = [spec.caption or spec.prompt] * len(images)
    return Pairs(
        images=images,
        prompts=prompts,
        concepts=concepts,
        styles=[""] * len(images),
        may_flip=np.ones(len(images), bool),
        captions=several,
        frames=frames,
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


def _source(spec):
    sources = [name for name in SOURCES if getattr(spec, name)]
    choices = f"{', '.join(SOURCES[:-1])} and {SOURCES[-1]}"
    if not sources:
        raise UserError(f"{spec.field}: give one of {choices}")
    if len(sources) > 1:
        raise UserError(
            f"{spec.field}: give only one of {choices}, not {' and '.join(sources)}; "
            f"clear the others, as in --{spec.field}.{sources[0]}="
        )
    return sources[0]


def _load_emoji(spec, data):
    rows = _emoji_rows(spec, data)
    concepts = [data.concepts[i] for i in data.concept_ids[rows]]
    styles = [data.styles[i] for i in data.style_ids[rows]]
    if len(set(concepts)) > 1 and not _check_template(spec):
        logging.warning("%s.template calls every concept the same", spec.field)
    return Pairs(
        images=_resize(data.images[rows], spec.size),
        prompts=[
            captions.fill(spec.template, concept, style)
            for concept, style in zip(concepts, styles, strict=True)
        ],
        concepts=concepts,
        styles=styles,
        may_flip=np.asarray([captions.may_flip(name) for name in concepts]),
    )


def _emoji_rows(spec, data):
    """Returns the row numbers of a spec's images, concept by concept."""
    names = resolve_names(spec.names, data.concepts, f"{spec.field}.names")
    styles = _check_styles(spec) or data.styles
    usable = np.isin(data.style_ids, [data.styles.index(style) for style in styles])
    if not spec.held_out:
        usable &= ~data.held_out
    rows = []
    for name in names:
        is_chosen = usable & (data.concept_ids == data.concepts.index(name))
        if name in spec.names and not is_chosen.any():  # asked for by its own name
            raise UserError(
                f"{spec.field}.names: every image of {name!r} in {', '.join(styles)} "
                "is held out of training; add a style"
            )
        rows.extend(np.flatnonzero(is_chosen))
    return rows[: spec.limit or None]


def _check_styles(spec):
    """Returns the styles, a tuple; UserError for an unknown one."""
    styles = (spec.styles,) if isinstance(spec.styles, str) else tuple(spec.styles)
    for style in styles:
        if style not in emoji.STYLES:
            raise _unknown(f"{spec.field}.styles", "style", style, emoji.STYLES)
    return styles


def _resize(images, size):
    if images.shape[1:3] == (size, size):
        return images
    originals = (Image.fromarray(image) for image in images)
    resized = [i.resize((size, size), Image.Resampling.LANCZOS) for i in originals]
    return np.stack([np.asarray(image) for image in resized])


def _check_template(spec):
    """Returns whether it names the concept; UserError for a bad one."""
    fields = captions.check_template(f"{spec.field}.template", spec.template)
    return bool(fields & captions.OF_CONCEPT)


def _check_tfds(spec):
    keys = ("caption_key", "label_key", "prompt")
    set_keys = [key for key in keys if getattr(spec, key).strip()]
    if len(set_keys) != 1:
        raise UserError(
            f"{spec.field}: tfds needs one of {', '.join(keys)}, not "
            f"{' and '.join(set_keys) or 'none'}"
        )
    if spec.label_key:
        fields = captions.check_template(f"{spec.field}.template", spec.template)
        if fields & captions.OF_STYLE:
            raise UserError(
                f"{spec.field}.template={spec.template!r} has a style, which labels "
                "do not have; try 'a photo of {a_concept}'"
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
