# SPDX-License-Identifier: Apache-2.0
"""An image grid with row and column labels."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gift_jax.runtime import files

_GAP = 4
_PAPER, _INK = (255, 255, 255), (20, 20, 20)
_FONT_SIZE = 14


def save_grid(images, path, *, columns=8, row_labels=(), column_labels=(), cell=96):
    """Writes images as one PNG, row by row, and returns its path.

    Args:
      images: uint8 "N H W 3", or a list of rows, each a sequence of "H W 3" images;
        rows may differ in length.
      columns: images a row, where images is one array.
      row_labels, column_labels: text; wrapped to fit. Too few is fine.
      cell: images smaller than this many pixels are enlarged by a whole factor.
    """
    rows = _as_rows(images, columns)
    if not rows or not any(len(row) for row in rows):
        raise ValueError("no images to draw")
    first = np.asarray(next(row[0] for row in rows if len(row)))
    factor = max(1, cell // first.shape[1])
    height, width = first.shape[0] * factor, first.shape[1] * factor
    font = ImageFont.load_default(_FONT_SIZE)
    left = _label_width(row_labels, font, width)
    heads = [_wrap(text, font, width) for text in column_labels]
    line = _FONT_SIZE + 3
    top = max((len(lines) for lines in heads), default=0) * line
    top += _GAP if top else 0
    n_columns = max(len(row) for row in rows)
    size = (left + n_columns * (width + _GAP), top + len(rows) * (height + _GAP))
    page = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(page)
    for c, lines in enumerate(heads[:n_columns]):
        _write(draw, (left + c * (width + _GAP), 0), lines, font, line)
    for r, row in enumerate(rows):
        y = top + r * (height + _GAP)
        if r < len(row_labels):
            lines = _wrap(row_labels[r], font, left - 2 * _GAP)
            offset = max(0, (height - len(lines) * line) // 2)
            _write(draw, (_GAP, y + offset), lines, font, line)
        for c, image in enumerate(row):
            image = Image.fromarray(np.asarray(image, np.uint8))
            image = image.resize((width, height), Image.Resampling.NEAREST)
            page.paste(image, (left + c * (width + _GAP), y))
    with files.atomic_write(path) as aside:
        page.save(aside)
    return Path(path)


def save_sheet(images, path, columns=8, **how):
    """Writes uint8 "N H W 3" as one file without gaps, for `read_sheet`; returns path.

    The last row is filled up with white. how: for Pillow's `Image.save`; the suffix of
    the path says the format.
    """
    images = np.asarray(images, np.uint8)
    n, h, w, _ = images.shape
    lines = -(-n // columns)
    full = np.full((lines * columns, h, w, 3), 255, np.uint8)
    full[:n] = images
    full = full.reshape(lines, columns, h, w, 3).transpose(0, 2, 1, 3, 4)
    with files.atomic_write(path) as aside:
        Image.fromarray(full.reshape(lines * h, columns * w, 3)).save(aside, **how)
    return Path(path)


def read_sheet(path, count, columns=8):
    """Returns the first `count` images of a `save_sheet`, uint8 "N H W 3"."""
    with Image.open(path) as sheet:
        full = np.asarray(sheet.convert("RGB"))
    lines = -(-count // columns)
    h, w = full.shape[0] // lines, full.shape[1] // columns
    full = full.reshape(lines, h, columns, w, 3).transpose(0, 2, 1, 3, 4)
    return full.reshape(-1, h, w, 3)[:count]


def _as_rows(images, columns):
    if hasattr(images, "ndim") and images.ndim == 4:
        images = np.asarray(images)
        return [images[i : i + columns] for i in range(0, len(images), columns)]
    return list(images)


def _label_width(labels, font, width):
    if not labels:
        return 0
    longest = max(font.getlength(text) for text in labels)
    return int(min(longest, max(2 * width, 160))) + 2 * _GAP + 1


def _wrap(text, font, width):
    lines = [""]
    for word in str(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _write(draw, corner, lines, font, line_height):
    for i, text in enumerate(lines):
        draw.text((corner[0], corner[1] + i * line_height), text, _INK, font)
