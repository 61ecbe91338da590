# SPDX-License-Identifier: Apache-2.0
"""Folders of images: all under one prompt, or each image with its own captions.

See `layout` for the layouts that are read.
"""

import math

from absl import logging

from gift_jax.data.sources import layout, metadata
from gift_jax.runtime.errors import UserError, one_line


def check(spec):
    """Raises UserError unless the folders of a `PairsSpec` can be listed.

    Opens no file; see `layout.parts`.
    """
    layout.parts(spec)


def list_images(spec):
    """Returns (paths, captions) of the images of a `PairsSpec` with a folder.

    captions: a tuple of one or more texts an image. Images in the order of the folders,
    then of the metadata, else sorted by name; the first `spec.limit` of them (0: all).
    An image is there several times if its folder says so, less what all have in common:
    of 10 and 20 repeats one and two.

    Raises: UserError of one line for a folder without images, for a link out of the
      folder, and for captions that cannot be read. Nothing outside the folders is
      opened.
    """
    paths, captions, repeats = [], [], []
    for part in layout.parts(spec):
        for note in part.notes:
            logging.info("%s", note)
        for warning in part.warnings:
            logging.warning("%s", warning)
        if part.metadata is None:
            files = [part.root / name for name in part.images]
            texts = [_captions(part, path) for path in files]
        else:
            files, texts = metadata.read(spec, part)
        paths += files
        captions += texts
        repeats += [part.repeats] * len(files)
    end = spec.limit or None
    common = math.gcd(*repeats[:end])
    rows = [i for i, n in enumerate(repeats[:end]) for _ in range(n // common)]
    return [paths[i] for i in rows], [captions[i] for i in rows]


def _captions(part, path):
    """Returns an image's captions: the lines of the text file beside it."""
    file = None if part.prompt else layout.caption_file(part.root, path)
    if file is None:
        return (part.prompt or part.own_name,)
    where = f"{part.where}: {one_line(file.name)}"
    if not file.is_file():  # to read a pipe would wait for a writer
        raise UserError(f"{where} must be a file; remove it")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read as UTF-8 text ({error})") from error
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{where} is empty; write the image's caption")
    return tuple(dict.fromkeys(lines))
