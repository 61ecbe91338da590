# SPDX-License-Identifier: Apache-2.0
"""The picture and prompt pairs that a method or an attack trains on.

They come from the embedded emoji set by name, or from a folder of pictures with one
prompt (the layout that DreamBooth scripts read).
"""

import dataclasses
import difflib
import pathlib

import numpy as np
from absl import logging
from PIL import Image, ImageOps

from gift_jax.config import UserError
from gift_jax.data import captions, emoji

KEYWORDS = ("all", "forbidden", "known", "known-safe", "unseen")


@dataclasses.dataclass(frozen=True)
class ConceptSpec:
    """Which pairs to use: `names` from the embedded set, or a `folder` and a `prompt`.

    Attributes: names: concepts and `KEYWORDS`, mixed freely. styles: those to use,
      empty for all six. template: a caption with {concept} or {a_concept} and maybe
      {style} or {a_style}. folder, prompt: pictures on disk, all under one prompt.
      size: side of the pictures, in pixels. held_out: True also uses the pictures that
      pretraining left out. field: the config field to name in an error.
    """

    names: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    template: str = captions.TEMPLATES[0]
    folder: str = ""
    prompt: str = ""
    size: int = 64
    held_out: bool = False
    field: str = "concepts"


@dataclasses.dataclass(frozen=True)
class ConceptData:
    """Pairs in memory; entry i of every field describes the same picture.

    Attributes: images: uint8 "N H W 3". prompts: N captions. concepts, styles: N names
      (of a folder: its prompt, and ""). may_flip: bool "N", whether the mirror image
      would be as good.
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


def pairs(spec, data=None):
    """Returns the `ConceptData` that a `ConceptSpec` asks for.

    Args: data: an `emoji.Emoji` already in memory, else it is loaded when needed.
    Raises: UserError for an unknown concept or style, a bad template, a missing or
      empty folder, an unreadable picture, or a spec of both sources or neither.
    """
    if bool(spec.folder) == bool(spec.names):
        rule = "only one of" if spec.folder else "one of"
        raise UserError(f"{spec.field}: give {rule} names and folder")
    if spec.folder:
        return _from_folder(spec)
    return _from_emoji(spec, data if data is not None else emoji.load())


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
        "forbidden": emoji.FORBIDDEN,
        "known": known,
        "known-safe": tuple(n for n in known if n not in emoji.FORBIDDEN),
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
    _check_template(spec)
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
    chosen = [data.concepts[i] for i in data.concept_ids[rows]]
    drawn = [data.styles[i] for i in data.style_ids[rows]]
    pairs_ = zip(chosen, drawn, strict=True)
    return ConceptData(
        images=_resized(data.images[rows], spec.size),
        prompts=[captions.fill(spec.template, c, s) for c, s in pairs_],
        concepts=chosen,
        styles=drawn,
        may_flip=np.asarray([captions.may_flip(name) for name in chosen]),
    )


def _resized(images, size):
    if images.shape[1:3] == (size, size):
        return images
    pictures = (Image.fromarray(image) for image in images)
    sized = [p.resize((size, size), Image.Resampling.LANCZOS) for p in pictures]
    return np.stack([np.asarray(picture) for picture in sized])


def _from_folder(spec):
    if not spec.prompt:
        raise UserError(f"{spec.field}.prompt is empty; a folder needs one prompt")
    if spec.size < 1:
        raise UserError(f"{spec.field}.size={spec.size} must be at least 1")
    folder = pathlib.Path(spec.folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{spec.field}.folder={spec.folder} is not a folder")
    paths = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    if not paths:
        raise UserError(
            f"{spec.field}.folder={spec.folder} has no pictures; put at least one there"
        )
    images = [read_picture(path, spec.size) for path in paths]
    logging.info("read %d pictures from %s", len(images), folder)
    return ConceptData(
        images=np.stack(images),
        prompts=[spec.prompt] * len(images),
        concepts=[spec.prompt] * len(images),
        styles=[""] * len(images),
        may_flip=np.ones(len(images), bool),
    )


def read_picture(path, size):
    """Returns a picture file as uint8 "size size 3": upright, over white, cropped.

    The shorter side is resized to `size` and the middle square kept.
    Raises: UserError if the file is not a picture that Pillow can read.
    """
    try:
        with Image.open(path) as image:
            rgba = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} cannot be read as a picture ({reason}); remove it or replace it"
        ) from error
    white = Image.new("RGBA", rgba.size, "white")
    rgb = Image.alpha_composite(white, rgba).convert("RGB")
    return np.asarray(ImageOps.fit(rgb, (size, size), Image.Resampling.LANCZOS))


def _check_template(spec):
    try:
        with_concept = captions.fill(spec.template, "thing", "style")
        without = captions.fill(spec.template, "", "style")
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"{spec.field}.template={spec.template!r} may use only {{concept}}, "
            "{a_concept}, {style} and {a_style}"
        ) from error
    if with_concept == without:
        logging.warning("%s.template names no concept: %s", spec.field, spec.template)


def _unknown(field, kind, name, choices):
    near = difflib.get_close_matches(str(name), choices, n=3, cutoff=0.6)
    if near:
        fix = "did you mean " + " or ".join(repr(choice) for choice in near) + "?"
    elif len(choices) <= 10:
        fix = "choose from " + ", ".join(choices)
    else:
        fix = f"one of {len(choices)} names or {', '.join(KEYWORDS)} is expected"
    return UserError(f"{field}: {kind} {name!r} is not in the data; {fix}")
