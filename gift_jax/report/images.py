# SPDX-License-Identifier: Apache-2.0
"""A benchmark's sheets as images that lie inside the page."""

import base64
import dataclasses
import io
import json
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from gift_jax.benchmark.table import RECOGNIZED
from gift_jax.report import results
from gift_jax.runtime.errors import UserError
from gift_jax.sampling import grid

COLUMNS = 8
LARGEST = 128  # pixels of an image on the page; larger ones are made smaller
_QUALITY = 80


@dataclasses.dataclass(frozen=True)
class Strip:
    """The first samples of one point of a cell.

    Attributes: cell, point: as results.json has them. is_last: of its cell. image: a
      data URI, `COLUMNS` samples a row, or "" with a note that says why. count: of the
      samples in it. marks: of each (recognized or None, the label that was seen).
    """

    cell: dict[str, Any]
    point: dict[str, Any]
    is_last: bool
    image: str = ""
    note: str = ""
    count: int = 0
    marks: tuple[tuple[bool | None, str], ...] = ()


def strips(run: results.Run, count: int) -> list[Strip]:
    """Returns every point's first `count` samples, with what was seen in each.

    Raises: UserError naming a sheet that is no image or has another size.
    """
    if count < 1:
        return []
    return [
        _strip(run.folder, cell, point, count)
        for cell in run.data["cells"]
        for point in cell["points"]
    ]


def _marks(path: pathlib.Path) -> dict[str, Any]:
    """Returns what is known of a sheet's single samples, from the file beside it."""
    path = path.with_suffix(".json")
    if not path.is_file():
        return {}
    try:
        marks = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(marks, dict):
        raise UserError(f"{path} must be an object")
    return marks


def _inside(folder: pathlib.Path, name: str | None) -> pathlib.Path | None:
    """Returns a file of the folder; None for no name, or one that leads out of it."""
    path = folder / name if name else None
    if path is None or not path.resolve().is_relative_to(folder.resolve()):
        return None
    return path


def _strip(folder: pathlib.Path, cell, point, count: int) -> Strip:
    is_last = point is cell["points"][-1]
    path, count = _inside(folder, point.get("sheet")), min(count, point["num"])
    if path is None:
        return Strip(cell, point, is_last, note="no image is named here")
    if not path.is_file():
        return Strip(cell, point, is_last, note=f"not in this folder: {point['sheet']}")
    try:
        images = grid.read_sheet(path, point["num"])[:count]
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        message = f"{path} is no sheet of {point['num']} images: {reason}"
        raise UserError(message) from error
    known = _marks(path)
    right = known.get(RECOGNIZED, [None] * count)[:count]
    right = [None if value is None else value > 0.5 for value in right]
    labels = known.get("labels", [""] * count)[:count]
    marks = tuple(zip(right, labels, strict=False))
    return Strip(cell, point, is_last, data_uri(images), count=count, marks=marks)


def data_uri(images: np.ndarray) -> str:
    """Returns uint8 "N H W 3" as one WebP data URI, `COLUMNS` images a row."""
    n, height, width = images.shape[:3]
    columns = min(COLUMNS, n)
    factor = min(1.0, LARGEST / max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    rows = -(-n // columns)
    page = Image.new("RGB", (columns * size[0], rows * size[1]), "white")
    for i, image in enumerate(images):
        small = Image.fromarray(image)
        if small.size != size:
            small = small.resize(size, Image.Resampling.LANCZOS)
        page.paste(small, (i % columns * size[0], i // columns * size[1]))
    file = io.BytesIO()
    page.save(file, "WEBP", quality=_QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
