# SPDX-License-Identifier: Apache-2.0
"""A group of pairs in a config, and its cached latents and conditioning."""

import dataclasses
from typing import Any

import jax
import numpy as np
from absl import logging

from gift_jax.data import captions, latents, pipeline
from gift_jax.data.images import CROPS
from gift_jax.data.pairs import SOURCES, Pairs, check_pairs, pairs_spec
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError, not_empty


@dataclasses.dataclass(frozen=True)
class Generation:
    """How a model draws the images of `num_generated`."""

    seed: int = config.number(0, low=0, doc="of the noise")
    steps: int = config.number(30, low=1, doc="of the sampler")
    guidance: float = config.number(7.5, low=1, doc="scale; 1: none")
    scheduler: str = config.value("", "as samples.scheduler; empty: the model's own")


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """The fields that say which images, and what they are called.

    Exactly one source is to be set: names, folder, tfds or num_generated.
    """

    names: tuple[str, ...] = config.value(
        (), "of the embedded set: things, or all, harmful, known, known-safe, unseen"
    )
    styles: tuple[str, ...] = config.value((), "of the embedded set; none: all six")
    drawn_styles: tuple[str, ...] = config.value(
        (), "of what the model draws itself, see num_drawn; none: as styles"
    )
    template: str = config.value(
        captions.TEMPLATES[0], "caption of names and labels: {concept}, {a_concept}"
    )
    folder: str = config.value(
        "",
        "images under `prompt`, or with captions: metadata.csv, metadata.jsonl, a .txt "
        """each, or kohya's "10_sks dog" folders; several as '["A", "B"]'""",
    )
    caption_column: str = config.value("text", "of the folder's metadata")
    tfds: str = config.value("", 'a prepared TFDS dataset, "name" or "name:version"')
    tfds_data_dir: str = config.value("", "where it lies; empty: TFDS's own place")
    split: str = config.value("train", "of the dataset")
    image_key: str = config.value("image", "the dataset's image feature")
    caption_key: str = config.value("", "the dataset's text feature")
    label_key: str = config.value("", "or its class feature, which fills `template`")
    num_generated: int = config.number(
        0, low=0, doc="images that the model draws for `prompt`, cached"
    )
    caption: str = config.value("", "what these are called; empty: their prompt")
    generation: Generation = config.group(Generation)
    prompt: str = config.value(
        "",
        """of every image, whatever its captions; for several folders '["a", "b"]'""",
    )
    limit: int = config.number(
        0, low=0, doc="images, the first in the source's order; 0: all"
    )
    crop: str = config.choice("center", CROPS, "to a square; none: squeezed")

    def is_set(self) -> bool:
        """Whether one of the sources is given."""
        return any(getattr(self, name) for name in SOURCES)


@dataclasses.dataclass(frozen=True)
class DataGroup(ImageSource):
    """The fields of a group of (image, prompt) pairs that a run trains on."""

    batch: int = config.number(1, low=1, doc="pairs an update")
    num_drawn: int = config.number(
        0, low=0, doc="images that the model draws of the same, besides; cached"
    )
    drawn_prompts: tuple[str, ...] = config.value(
        ("{concept}",), "of those: {concept}, {a_concept}, {style} and {a_style}"
    )
    prompt_dropout: float = config.number(
        0.0, low=0, high=1, doc="share of pairs whose prompt is left empty"
    )
    nonce_prompts: float = config.number(
        0.0, low=0, high=1, doc='share of pairs called by made-up words, as "sks"'
    )
    nonce_template: str = config.value(
        "a photo of {nonce}", "of those; with names maybe {a_style} too"
    )
    augmented_copies: int = config.number(
        1, low=1, doc="cached versions of each image: itself, the rest augmented"
    )
    flip: float = config.number(
        0.0, low=0, high=1, doc="probability of mirroring one that may be"
    )
    rotate: float = config.number(0.0, low=0, high=180, doc="degrees, at most")
    color: float = config.number(
        0.0, low=0, high=1, doc="share of other colors mixed in, at most"
    )
    shift: int = config.number(0, low=0, doc="pixels, at most, each way")
    scale: float = config.number(0.0, low=0, high=0.99, doc="fraction, at most")

    def check(self, field: str) -> None:
        source = check_source(self, field)
        for template in self.drawn_prompts:
            name = f"{field}.drawn_prompts"
            styled = captions.check_template(name, template) & captions.OF_STYLE
            has_styles = source == "names" or self.drawn_styles
            if styled and self.num_drawn and not has_styles:
                fix = f"--{name}={{concept}}, or set {field}.drawn_styles"
                raise _has_no_style(name, template, source, fix)
        if self.num_drawn:
            not_empty(f"{field}.drawn_prompts", self.drawn_prompts)
        if not self.nonce_prompts:
            return
        name = f"{field}.nonce_template"
        styled = captions.check_nonce_template(name, self.nonce_template)
        if styled and source != "names":
            fix = "'a photo of {nonce}'"
            raise _has_no_style(name, self.nonce_template, source, fix)


def _has_no_style(name: str, template: str, source: str, fix: str) -> UserError:
    return UserError(
        f"{name}={template!r} has a style, which images from {source} have not; "
        f"try {fix}"
    )


def check_source(source: ImageSource, field: str) -> str:
    """Returns which of `SOURCES` is set. Raises: UserError, see `check_pairs`."""
    return check_pairs(pairs_spec(source, field.removeprefix("config.")))


def cached_source(model, data, spec, key, *, ids=False) -> pipeline.ArraySource:
    """Returns the encoded pairs as a Grain source of {mean, std, cond, concept}.

    cond: of the prompt, and what the model is told of the image, see `image_cond`.

    See `augment_prompts` for what the rows are called.

    Args: ids: token ids, int32 "N L", under `ids` in place of the prompt's cond, for
      a text encoder that trains.
    """
    cache = latents.cache_latents(
        model.encode_images,
        model.tokenize if ids else model.encode_text,
        data,
        copies=spec.augmented_copies,
        key=key,
        flip=spec.flip,
        shift=spec.shift,
        scale=spec.scale,
        rotate=spec.rotate,
        color=spec.color,
        # copies take 1, 2 ... of the key
        prompts=augment_prompts(data, spec, jax.random.fold_in(key, 0)),
    )
    own = model.image_cond(np.tile(data.frames, (spec.augmented_copies, 1)))
    if ids:
        cache["ids"] = cache.pop("cond")
        if own:
            cache["cond"] = pipeline.DeduplicatedArray(
                own, np.arange(len(cache["ids"]))
            )
    elif own:
        text = cache["cond"]
        cache["cond"] = pipeline.DeduplicatedArray(text.table, text.rows, own)
    return pipeline.ArraySource(cache)


def augment_prompts(data: Pairs, spec: Any, key: jax.Array) -> list[str]:
    """Returns what the spec.augmented_copies of every pair are called, copy by copy.

    Of an image with several captions each copy has another, the first one drawn. A
    share `nonce_prompts` goes by a made-up word, another one each time, under which
    an attacker may hide what a picture shows. A share `prompt_dropout` is left empty:
    what a model draws depends on these too, through classifier-free guidance.
    """
    prompts = _draw_captions(data, spec.augmented_copies, jax.random.fold_in(key, 2))
    styles = data.styles * spec.augmented_copies
    if spec.nonce_prompts:
        k_rows, k_words = jax.random.split(jax.random.fold_in(key, 1))
        rows = _random_subset(k_rows, spec.nonce_prompts, len(prompts))
        rng = np.random.default_rng(np.asarray(jax.random.key_data(k_words)))
        for row in rows:
            word, style = captions.nonce_word(rng), styles[row]
            template = spec.nonce_template
            prompts[row] = captions.fill_nonce(template, word, style)
    for row in _random_subset(key, spec.prompt_dropout, len(prompts)):
        prompts[row] = ""
    return prompts


def _draw_captions(data: Pairs, copies: int, key: jax.Array) -> list[str]:
    """Returns a caption for every copy of every pair, copy by copy."""
    most = max(map(len, data.captions or ()), default=1)
    if most == 1:
        return data.prompts * copies
    logging.info(
        "images have up to %d captions; each of augmented_copies=%d takes one",
        *(most, copies),
    )
    starts = np.asarray(jax.random.randint(key, (len(data),), 0, 2**30))
    rows = list(zip(data.captions, starts.tolist(), strict=True))
    return [
        texts[(start + copy) % len(texts)]
        for copy in range(copies)
        for texts, start in rows
    ]


def _random_subset(key: jax.Array, share: float, count: int) -> np.ndarray:
    """Returns about share * count indices below count, one at least if share is set."""
    if not share:
        return np.zeros(0, int)
    rows = np.flatnonzero(jax.random.bernoulli(key, share, (count,)))
    return rows if rows.size else np.asarray([jax.random.randint(key, (), 0, count)])
