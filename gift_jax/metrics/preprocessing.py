# SPDX-License-Identifier: Apache-2.0
"""From pictures to what an image backbone takes, as its reference prepares them."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gift_jax.models import safetensors_io
from gift_jax.runtime.errors import UserError

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_IMMA_SIDE = 64
_BICUBIC = int(Image.Resampling.BICUBIC)
_BILINEAR = int(Image.Resampling.BILINEAR)
_CONVNEXT_WHOLE = 384  # pixels, from which on nothing is cropped
_FILE = "preprocessor_config.json"


class Pixels(NamedTuple):
    """How a picture becomes what the model takes.

    Attributes: side: of the square that the model takes, in pixels. short: what the
      picture's short side is first resized to; 0: it is squeezed to the square at once.
      resample: PIL's number of the filter. mean, std: of each channel, for values in
      [0, 1].
    """

    side: int
    short: int
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def judge(side: int) -> Pixels:
    """Returns how the judge takes pictures: in [-1, 1], at its own size."""
    return Pixels(side, side, _BICUBIC, (0.5,) * 3, (0.5,) * 3)


def read(folder: Path, as_dino: int = 0) -> Pixels:
    """Returns what a folder's preprocessor_config.json says.

    Args: as_dino: not 0: where the file crops nothing, as DINO's, the short side is
      resized to 256/224 of this many pixels and the centre cropped, bicubic, as
      DINO's authors evaluate it.
    Raises: UserError for a file that is malformed or asks for anything else.
    Source: transformers' CLIPImageProcessor and BitImageProcessor; eval_linear.py of
      https://github.com/facebookresearch/dino.
    """
    file = folder / _FILE
    found = safetensors_io.read_json(file)
    mean, std = _mean_and_std(file, found)
    if not found.get("do_center_crop", "crop_size" in found):
        if not as_dino:
            raise UserError(f"{file}: do_center_crop must be true, with a crop_size")
        return Pixels(as_dino, round(as_dino * 256 / 224), _BICUBIC, mean, std)
    side = _length(file, found, "crop_size", "height")
    short = _length(file, found, "size", "shortest_edge")
    if short < side:
        raise UserError(
            f"{file}: size={short}, crop_size={side}; size must be at least crop_size"
        )
    return Pixels(side, short, _resample(file, found, _BICUBIC), mean, std)


def read_reference(folder: Path, usual: str) -> Pixels:
    """Returns what the processor does that preprocessor_config.json names.

    Args: usual: "ViT" or "ConvNext", the processor of a file that names none.
    Raises: UserError for another processor, and for a file that is malformed.
    Source: transformers' ViTImageProcessor (squeezed to the square) and
      ConvNextImageProcessor (below 384 pixels the short side is resized to size /
      crop_pct and the centre cropped, from there on squeezed); CLIP's, Bit's: `read`.
    """
    file = folder / _FILE
    found = safetensors_io.read_json(file)
    fields = ("image_processor_type", "feature_extractor_type")
    named = str(next((found[f] for f in fields if found.get(f)), usual))
    kind = re.sub("(ImageProcessor(Fast)?|FeatureExtractor)$", "", named)
    if kind in ("CLIP", "Bit"):
        return read(folder)
    if kind not in ("ViT", "ConvNext"):
        raise UserError(
            f"{file}: image_processor_type={named!r} is not supported; must be that of "
            "ViT, ConvNext, CLIP or Bit"
        )
    mean, std = _mean_and_std(file, found)
    resample = _resample(file, found, _BILINEAR)
    side = _length(file, found, "size", "height" if kind == "ViT" else "shortest_edge")
    if kind == "ViT" and side != _length(file, found, "size", "width"):
        raise UserError(f"{file}: size={found['size']!r} must be of a square")
    if kind == "ViT" or side >= _CONVNEXT_WHOLE:
        return Pixels(side, 0, resample, mean, std)
    share = found.get("crop_pct")
    share = 224 / 256 if share is None else share
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise UserError(f"{file}: crop_pct={share!r} must be a number in (0, 1]")
    return Pixels(side, int(side / share), resample, mean, std)


def of_size(folder: Path, pixels: Pixels, image_size: int) -> Pixels:
    """Returns them; UserError if they are not of the size that the model takes."""
    if pixels.side != image_size:
        raise UserError(
            f"{folder / _FILE}: makes {pixels.side} pixels a side, but config.json "
            f"says image_size={image_size}; they must be equal"
        )
    return pixels


def standard(images: np.ndarray, pixels: Pixels) -> np.ndarray:
    """Returns uint8 "B H W 3" pictures as float32 "B 3 side side".

    Source: transformers' image processors with PIL: resized in bytes, the long side
      rounded down, the centre cropped with the odd pixel at the end.
    """
    squares = np.stack([_square(image, pixels) for image in images])
    return _normalize(squares.astype(np.float32) / 255.0, pixels.mean, pixels.std)


def imma_64px(images: np.ndarray, side: int) -> np.ndarray:
    """Returns uint8 "B H W 3" pictures as float32 "B 3 side side", as IMMA has them.

    Squeezed into 64x64 whatever their shape, then taken for [-1, 1] though they are in
    [0, 1], which leaves [0.5, 1]; enlarged without clipping; CLIP's mean and std, for
    DINO too. All kept, so that numbers compare with those published.

    Source: https://github.com/amberyzheng/IMMA, eval/eval.py, with the torchvision
      0.15 of its environment: no antialiasing of tensors. (On a GPU it runs CLIP in
      float16, which this does not.)
    """
    size, box = (_IMMA_SIDE, _IMMA_SIDE), Image.Resampling.BILINEAR
    small = [np.asarray(Image.fromarray(x).resize(size, box)) for x in images]
    x_BHWC = (np.stack(small).astype(np.float32) / 255.0 + 1.0) / 2.0
    enlarge = cubic_matrix(_IMMA_SIDE, side)
    x_BHWC = np.einsum("ih,jw,bhwc->bijc", enlarge, enlarge, x_BHWC, optimize=True)
    return _normalize(x_BHWC, _CLIP_MEAN, _CLIP_STD)


def cubic_matrix(before: int, after: int) -> np.ndarray:
    """Returns float32 "after before": bicubic resizing of one axis, as PyTorch does it.

    Args: before, after: lengths.
    Source: torch.nn.functional.interpolate(mode="bicubic", align_corners=False): Keys'
      cubic with a = -0.75 between the four nearest, the ends repeated.
    """
    a = -0.75
    centre = np.arange(after, dtype=np.float32) + np.float32(0.5)
    place = centre * np.float32(before / after) - np.float32(0.5)  # rounded as there
    first, matrix = np.floor(place), np.zeros((after, before))
    for tap in (-1, 0, 1, 2):
        d = np.abs(place - first - tap)
        near = ((a + 2) * d - (a + 3)) * d**2 + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        column = np.clip(first + tap, 0, before - 1).astype(int)
        np.add.at(matrix, (np.arange(after), column), np.where(d <= 1, near, far))
    return matrix.astype(np.float32)


def _square(image, pixels):
    height, width = image.shape[:2]
    side = pixels.side
    if not pixels.short:
        return np.asarray(Image.fromarray(image).resize((side, side), pixels.resample))
    long = int(pixels.short * max(height, width) / min(height, width))
    size = (pixels.short, long) if width <= height else (long, pixels.short)
    image = np.asarray(Image.fromarray(image).resize(size, pixels.resample))
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]


def _normalize(x_BHWC, mean, std):
    x_BHWC = (x_BHWC - np.float32(mean).reshape(1, 1, 1, 3)) / np.float32(std)
    return np.ascontiguousarray(np.transpose(x_BHWC, (0, 3, 1, 2)))


def _mean_and_std(file, found):
    """Returns both; UserError if the file leaves out a step that they belong to."""
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not found.get(step, True):
            raise UserError(f"{file}: {step}=false is not supported; must be true")
    factor = found.get("rescale_factor", 1 / 255)
    if type(factor) not in (int, float) or abs(factor * 255 - 1) > 1e-6:
        raise UserError(f"{file}: rescale_factor={factor!r} must be 1/255")
    return [_numbers(file, found, field) for field in ("image_mean", "image_std")]


def _resample(file, found, usual) -> int:
    """Returns PIL's number of the filter; UserError if it has no such filter."""
    resample = found.get("resample", usual)
    if resample not in tuple(Image.Resampling):
        raise UserError(
            f"{file}: resample={resample!r} must be one of PIL's filters, 0 to 5"
        )
    return resample


def _numbers(file, found, field) -> tuple[float, ...]:
    value = found.get(field)
    if (
        not isinstance(value, list)
        or len(value) != 3
        or set(map(type, value)) - {float, int}
    ):
        raise UserError(f"{file}: {field}={value!r} must be three numbers")
    return tuple(value)


def _length(file: Path, found: dict[str, Any], field: str, key: str) -> int:
    """Returns a size that older files give as a number, newer as {key: number}."""
    value = found.get(field)
    value = value.get(key) if isinstance(value, dict) else value
    if type(value) is not int or value < 1:
        raise UserError(
            f"{file}: {field}={found.get(field)!r} must say {key}, in pixels"
        )
    return value
