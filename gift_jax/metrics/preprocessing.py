# SPDX-License-Identifier: Apache-2.0
"""From images to what an image backbone takes, as its reference prepares them."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gift_jax.models import safetensors_io
from gift_jax.runtime.errors import UserError

PROTOCOLS = ("standard", "imma-64px")
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_IMMA_SIDE = 64
_BICUBIC = int(Image.Resampling.BICUBIC)
_BILINEAR = int(Image.Resampling.BILINEAR)
_CONVNEXT_UNCROPPED = 384  # pixels, from which on nothing is cropped
_FILE = "preprocessor_config.json"


class Preprocessing(NamedTuple):
    """How an image becomes what the model takes.

    Attributes: side: of the square that the model takes, in pixels. short: what the
      image's short side is first resized to; 0: it is squeezed to the square at once.
      resample: PIL's number of the filter. mean, std: of each channel, for values in
      [0, 1].
    """

    side: int
    short: int
    resample: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def squeezed(self) -> "Preprocessing":
        """Returns the same without a crop: the whole image, squeezed to the square."""
        return self._replace(short=0)


def judge(side: int) -> Preprocessing:
    """Returns how the judge takes images: in [-1, 1], at its own size."""
    return Preprocessing(side, side, _BICUBIC, (0.5,) * 3, (0.5,) * 3)


def read(folder: Path, dino_side: int = 0) -> Preprocessing:
    """Returns what a folder's preprocessor_config.json asks for.

    Args: dino_side: not 0: where the file crops nothing, as DINO's, the short side is
      resized to 256/224 of this many pixels and the center cropped, bicubic, as
      DINO's authors evaluate it.
    Raises: UserError for a file that is malformed or asks for anything else.
    Source: transformers' CLIPImageProcessor and BitImageProcessor (DINOv2's);
      eval_linear.py of https://github.com/facebookresearch/dino.
    """
    file = folder / _FILE
    config = safetensors_io.read_json(file)
    mean, std = _mean_and_std(file, config)
    if not config.get("do_center_crop", "crop_size" in config):
        if not dino_side:
            raise UserError(f"{file}: do_center_crop must be true, with a crop_size")
        short = round(dino_side * 256 / 224)
        return Preprocessing(dino_side, short, _BICUBIC, mean, std)
    side = _length(file, config, "crop_size", "height")
    short = _length(file, config, "size", "shortest_edge")
    if short < side:
        raise UserError(
            f"{file}: size={short}, crop_size={side}; size must be at least crop_size"
        )
    return Preprocessing(side, short, _resample(file, config, _BICUBIC), mean, std)


def read_classifier(folder: Path, default: str) -> Preprocessing:
    """Returns what the processor does that preprocessor_config.json names.

    Args: default: "ViT" or "ConvNext", the processor of a file that names none.
    Raises: UserError for another processor, and for a file that is malformed.
    Source: transformers' ViTImageProcessor (squeezed to the square) and
      ConvNextImageProcessor, which ResNets use (below 384 pixels the short side is
      resized to size / crop_pct and the center cropped, from there on squeezed).
    """
    file = folder / _FILE
    config = safetensors_io.read_json(file)
    fields = ("image_processor_type", "feature_extractor_type")
    name = str(next((config[f] for f in fields if config.get(f)), default))
    kind = re.sub("(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", name)
    if kind not in ("ViT", "ConvNext"):
        raise UserError(
            f"{file}: image_processor_type={name!r} is not supported; must be that of "
            "ViT or ConvNext"
        )
    mean, std = _mean_and_std(file, config)
    resample = _resample(file, config, _BILINEAR)
    key = "height" if kind == "ViT" else "shortest_edge"
    side = _length(file, config, "size", key)
    if kind == "ViT" and side != _length(file, config, "size", "width"):
        raise UserError(f"{file}: size={config['size']!r} must be of a square")
    if kind == "ViT" or side >= _CONVNEXT_UNCROPPED:
        return Preprocessing(side, 0, resample, mean, std)
    share = config.get("crop_pct")
    share = 224 / 256 if share is None else share
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise UserError(f"{file}: crop_pct={share!r} must be a number in (0, 1]")
    return Preprocessing(side, int(side / share), resample, mean, std)


def check_size(folder: Path, steps: Preprocessing, image_size: int) -> Preprocessing:
    """Returns the steps; UserError if their result has not the model's own size."""
    if steps.side != image_size:
        raise UserError(
            f"{folder / _FILE}: makes {steps.side} pixels a side, but config.json "
            f"says image_size={image_size}; they must be equal"
        )
    return steps


def standard(images: np.ndarray, steps: Preprocessing) -> np.ndarray:
    """Returns uint8 "B H W 3" images as float32 "B 3 side side".

    Source: transformers' image processors with PIL: resized in bytes, the long side
      rounded down, the center cropped with the odd pixel at the end.
    """
    squares = np.stack([_square(image, steps) for image in images])
    return _normalize(squares.astype(np.float32) / 255.0, steps.mean, steps.std)


def imma_64px(images: np.ndarray, side: int) -> np.ndarray:
    """Returns uint8 "B H W 3" images as float32 "B 3 side side", as IMMA has them.

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
    center = np.arange(after, dtype=np.float32) + np.float32(0.5)
    place = center * np.float32(before / after) - np.float32(0.5)  # rounded as there
    first, matrix = np.floor(place), np.zeros((after, before))
    for tap in (-1, 0, 1, 2):
        d = np.abs(place - first - tap)
        near = ((a + 2) * d - (a + 3)) * d**2 + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        column = np.clip(first + tap, 0, before - 1).astype(int)
        np.add.at(matrix, (np.arange(after), column), np.where(d <= 1, near, far))
    return matrix.astype(np.float32)


def _square(image, steps):
    height, width = image.shape[:2]
    side = steps.side
    if not steps.short:
        return np.asarray(Image.fromarray(image).resize((side, side), steps.resample))
    long = int(steps.short * max(height, width) / min(height, width))
    size = (steps.short, long) if width <= height else (long, steps.short)
    image = np.asarray(Image.fromarray(image).resize(size, steps.resample))
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]


def _normalize(x_BHWC, mean, std):
    x_BHWC = (x_BHWC - np.float32(mean).reshape(1, 1, 1, 3)) / np.float32(std)
    return np.ascontiguousarray(np.transpose(x_BHWC, (0, 3, 1, 2)))


def _mean_and_std(file, config):
    """Returns both; UserError if the file leaves out a step that they belong to."""
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not config.get(step, True):
            raise UserError(f"{file}: {step}=false is not supported; must be true")
    factor = config.get("rescale_factor", 1 / 255)
    if type(factor) not in (int, float) or abs(factor * 255 - 1) > 1e-6:
        raise UserError(f"{file}: rescale_factor={factor!r} must be 1/255")
    mean, std = "image_mean", "image_std"
    return _three_numbers(file, config, mean), _three_numbers(file, config, std)


def _resample(file, config, default) -> int:
    """Returns PIL's number of the filter; UserError if it has no such filter."""
    resample = config.get("resample", default)
    if resample not in tuple(Image.Resampling):
        raise UserError(
            f"{file}: resample={resample!r} must be one of PIL's filters, 0 to 5"
        )
    return resample


def _three_numbers(file, config, field) -> tuple[float, ...]:
    value = config.get(field)
    if (
        not isinstance(value, list)
        or len(value) != 3
        or set(map(type, value)) - {float, int}
    ):
        raise UserError(f"{file}: {field}={value!r} must be three numbers")
    return tuple(value)


def _length(file: Path, config: dict[str, Any], field: str, key: str) -> int:
    """Returns a size that older files give as a number, newer as {key: number}."""
    value = config.get(field)
    value = value.get(key) if isinstance(value, dict) else value
    if type(value) is not int or value < 1:
        raise UserError(
            f"{file}: {field}={config.get(field)!r} must say {key}, in pixels"
        )
    return value
