# SPDX-License-Identifier: Apache-2.0
"""A benchmark's sheets as pictures that lie inside the page."""

import base64
import io
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from gift_jax.report import results
from gift_jax.runtime.errors import UserError
from gift_jax.sampling import grid

COLUMNS = 8
LARGEST = 128  # pixels of a picture on the page; larger ones are made smaller
_QUALITY = 80


def embedded(run: results.Run, count: int) -> list[dict[str, Any]]:
    """Returns every point's first `count` pictures, with what was measured of each.

    Each is the point's place in the matrix and `image`, a data URI of one picture with
    `columns` pictures a row, or `note`, which says why there is none.
    Raises: UserError naming a sheet that is no picture or has another size.
    """
    return [
        _entry(run, cell, point, count)
        for cell in run.data["cells"]
        for point in cell["points"]
    ]


def _entry(run, cell, point, count) -> dict[str, Any]:
    shown = min(count, point["num"])
    place = ("concept", "method", "side", "attack", "prompt", "seed")
    entry = {key: cell[key] for key in place}
    entry |= {"step": point["step"], "num": point["num"], "values": point["values"]}
    entry["samples"] = {
        name: values[:shown] for name, values in point.get("samples", {}).items()
    }
    for key in ("things", "styles"):
        entry[key] = list(point.get(key) or ())[:shown]
    name = point.get("sheet")
    path = run.folder / name if name else None
    if shown < 1:
        return entry | {"note": "none was asked for"}
    if path is None or not _is_inside(path, run.folder):
        return entry | {"note": "no picture is named here"}
    if not path.is_file():
        return entry | {"note": f"not in this folder: {name}"}
    images = _read(path, point["num"])[:shown]
    return entry | {"image": data_uri(images), "shown": shown}


def _is_inside(path: pathlib.Path, folder: pathlib.Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _read(path: pathlib.Path, num: int) -> np.ndarray:
    try:
        images = grid.read_sheet(path, num)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        what = " ".join(str(error).split())
        raise UserError(f"{path} is no sheet of {num} pictures: {what}") from error
    return images


def data_uri(images: np.ndarray) -> str:
    """Returns uint8 "N H W 3" as one WebP data URI, `COLUMNS` pictures a row."""
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
