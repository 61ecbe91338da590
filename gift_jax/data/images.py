# SPDX-License-Identifier: Apache-2.0
"""Image files as square uint8 arrays: upright, over white, of one size."""

import importlib
import io
import os
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from gift_jax.runtime import progress
from gift_jax.runtime.errors import UserError, one_line

_PNG = b"\x89PNG\r\n\x1a\n"
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
# Text that may say which way is up.
_ORIENTATION = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
_HEIF_BRANDS = frozenset(b"heic heim heis heix hevc hevx mif1 msf1".split())

CROPS = ("center", "random", "none")
# Pillow may lack some of these: then the file is an error, not overlooked.
_KINDS = (
    "avif bmp gif heic heif jfif jp2 jpe jpeg jpg pgm png pnm ppm tga tif tiff webp"
)
SUFFIXES = frozenset(f".{kind}" for kind in _KINDS.split(" "))
_MAX_SIDE = 100_000  # pixels: to resize takes memory by the side, not by the area
# What Pillow raises for files that are no image, cut short or damaged.
_BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class _NoHeifError(OSError):
    """A phone's photo, which Pillow alone does not read."""


def read_images(files, count, size, *, crop="center", seed=0):
    """Returns uint8 "N size size 3", see `read_framed`."""
    return read_framed(files, count, size, crop=crop, seed=seed)[0]


def read_framed(files, count, size, *, crop="center", seed=0):
    """Returns (uint8 "N size size 3", int32 "N 4") of image files, decoded one by one.

    The second: each image's height and width as it was, and how many pixels of the
    resized one are cut off above and to the left.

    Args: files: iterable of (name for errors, path or file object). crop, seed: see
      `read_image`; image i draws from the seed and i alone.
    Raises: UserError for a file that cannot be read.
    """
    images = np.empty((count, size, size, 3), np.uint8)
    frames = np.empty((count, 4), np.int32)
    with progress.bar("images", count) as bar:
        for i, (name, file) in enumerate(files):
            rng = np.random.default_rng((seed, i))
            images[i], frames[i] = _read(file, size, crop=crop, rng=rng, name=name)
            bar.update(i + 1)
    return images, frames


def read_image(file, size, *, crop="center", rng=None, name=""):
    """Returns an image file as uint8 "size size 3": upright, over white.

    Args: file: a path or a binary file object; of an animation the first frame counts.
      size: pixels. crop: "center": the shorter side becomes `size` and the middle
      square stays; "random": a square anywhere along the longer side, drawn from `rng`;
      "none": the whole image, its aspect lost. rng: a NumPy generator. name: for
      errors, by default the file's.
    Raises: UserError if the file is no image that Pillow can read, is cut short, is
      too large (Pillow's limit of 179 million pixels, or 100,000 along a side), has
      float or 32-bit pixels, or is of none of the kinds in `SUFFIXES`.
    """
    return _read(file, size, crop, rng, name)[0]


def whole_frames(images):
    """Returns the frames, see `read_framed`, of uint8 "N H W 3" as they are."""
    height, width = images.shape[1:3]
    frame = np.asarray([height, width, 0, 0], np.int32)
    return np.broadcast_to(frame, (len(images), 4))


def _read(file, size, crop, rng, name):
    """Returns (image, frame), see `read_image` and `read_framed`."""
    try:
        with warnings.catch_warnings():
            # Such as half the limit of size or odd EXIF; what matters is an error.
            warnings.simplefilter("ignore")
            with _open(file) as image:
                ImageOps.exif_transpose(image, in_place=True)
                rgb = _over_white(_eight_bit(image))
    except _BROKEN as error:
        reason = one_line(error) or type(error).__name__
        fix = "remove it or replace it"
        if isinstance(error, UnidentifiedImageError):
            reason = "of no known kind"
        if isinstance(error, _NoHeifError):
            fix = "pip install pillow-heif, or save it as a JPEG or PNG"
        raise UserError(
            f"{one_line(name or file)} cannot be read as an image ({reason}); {fix}"
        ) from error
    if crop == "none":
        square = rgb.resize((size, size), Image.Resampling.LANCZOS)
        return np.asarray(square), (rgb.height, rgb.width, 0, 0)
    place = tuple(rng.uniform(size=2)) if crop == "random" else (0.5, 0.5)
    square = ImageOps.fit(rgb, (size, size), Image.Resampling.LANCZOS, centering=place)
    scale = size / min(rgb.size)
    left, top = (
        round((side * scale - size) * p)
        for side, p in zip(rgb.size, place, strict=True)
    )
    return np.asarray(square), (rgb.height, rgb.width, top, left)


def short_side(file):
    """Returns an image file's shorter side in pixels; UserError as `read_image`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _open(file) as image:
                return min(image.size)
    except _BROKEN:
        read_image(file, 1)  # which says what is wrong
        raise


def _open(file):
    """Opens an image, of a kind in `SUFFIXES` whatever its name says.

    Pillow knows others, for one of which (EPS) it runs another program.
    """
    on_disk = isinstance(file, (str, os.PathLike))
    if on_disk and os.path.exists(file) and not os.path.isfile(file):
        raise OSError("no regular file")  # to open a pipe would wait for a writer
    head = _head(file)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS and b"avif" not in head:
        _register_heif()
    if head[:8] == _PNG:
        file = _without_text(file)
    kinds = Image.registered_extensions()
    image = Image.open(file, formats=sorted({kinds[s] for s in SUFFIXES & set(kinds)}))
    if max(image.size) > _MAX_SIDE:
        image.close()
        raise ValueError(f"a side of {max(image.size)} pixels")
    return image


def _head(file):
    """Returns a file's first bytes; a file object stays where it is."""
    if isinstance(file, (str, os.PathLike)):
        with open(file, "rb") as opened:
            return opened.read(64)
    place = file.tell()
    head = file.read(64)
    file.seek(place)
    return head


def _register_heif():
    """Has Pillow read HEIC and HEIF; raises _NoHeifError if pillow-heif is missing."""
    try:
        heif = importlib.import_module("pillow_heif")
    except ImportError as error:
        raise _NoHeifError("HEIC, which needs pillow-heif") from error
    heif.register_heif_opener()


def _without_text(file):
    """Returns a PNG without its text, of which Pillow reads a megabyte at most.

    Programs that draw store their whole workflow there.
    """
    if isinstance(file, (str, os.PathLike)):
        with open(file, "rb") as opened:
            data = opened.read()
    else:
        data = file.read()
    chunks, place = [data[:8]], 8
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        kind, start = data[place + 4 : place + 8], data[place + 8 : place + 40]
        if kind not in _TEXT_CHUNKS or start.startswith(_ORIENTATION):
            chunks.append(data[place:end])
        place = end
    return io.BytesIO(b"".join(chunks))


def _eight_bit(image):
    """Returns 16-bit gray as "L": Pillow's own conversion makes it white above 255."""
    if image.mode == "F":
        raise ValueError("float pixels have no agreed range; save it with 8 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels have no agreed range; save it with 8 bits")
    values = values.astype(np.uint32)
    values += 128
    values //= 257
    return Image.fromarray(values.astype(np.uint8))


def _over_white(image):
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    # Nothing is kept that is not needed: an image may take half a GB a copy.
    white = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return white.convert("RGB")
