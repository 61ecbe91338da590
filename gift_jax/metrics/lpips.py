# SPDX-License-Identifier: Apache-2.0
"""How far apart two images look: LPIPS, which needs a file of weights.

It compares a network's features, stage by stage: channels at unit length, squared
differences, mean over places, AlexNet's channels weighted by what people said.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from PIL import Image

from gift_jax.metrics.base import (
    EvalSet,
    Metric,
    MetricResult,
    UnavailableError,
    mean_result,
)
from gift_jax.metrics.settings import Settings
from gift_jax.models import safetensors_io
from gift_jax.models.batching import map_batches
from gift_jax.runtime.errors import UserError

FILE = "lpips_alex.safetensors"
BATCH = 16  # images of one compiled size
EXPORT = (  # Python, where torch, torchvision and lpips are
    "import re, lpips, safetensors.torch as st; "
    'st.save_file({re.sub(r"net.slice\\d", "features", k).replace("model.1.", ""): v '
    'for k, v in lpips.LPIPS(net="alex").state_dict().items() '
    f'if re.match(r"net|lin\\d", k)}}, "{FILE}")'
)
RANGES = {"standard": (-1.0, 1.0), "imma-64px": (0.0, 1.0)}  # protocol: of the input
SIDE = 64  # pixels, on which LPIPS was learned
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# index in torchvision's `features`: (stride, padding, pooled before, kernel's shape)
_LAYERS = {
    0: (4, 2, False, (64, 3, 11, 11)),
    3: (1, 2, True, (192, 64, 5, 5)),
    6: (1, 1, True, (384, 192, 3, 3)),
    8: (1, 1, False, (256, 384, 3, 3)),
    10: (1, 1, False, (256, 256, 3, 3)),
}

Stages = Sequence[jax.Array]  # float32 "B P C" each: places, channels


@dataclasses.dataclass(frozen=True, eq=False)
class Distance:
    """A perceptual distance of images.

    Attributes: name: of the metric. side: pixels that images are resized to. stages:
      float32 "B S S 3" in `span` -> `Stages`, scaled so that the distance of two images
      is the sum of squared differences. span: of the pixel values. provenance: of a
      result.
    """

    name: str
    side: int
    stages: Callable[[np.ndarray], Stages]
    span: tuple[float, float]
    provenance: dict[str, Any]


@functools.lru_cache(maxsize=4)
def load(path: str, protocol: str = "standard") -> Distance:
    """Returns LPIPS v0.1 on AlexNet; loaded once.

    Args: path: `FILE`, or a folder with it, tensors named as torchvision's alexnet
        ("features.0.weight" ...) and "lin0.weight" ... "lin4.weight"; `EXPORT` writes
        it.
      protocol: "standard": values in [-1, 1]; "imma-64px": by the mistake of IMMA's
        script, [0, 1].
    Raises: UnavailableError if there is no such file. UserError for a tensor that is
      missing or of another shape.
    Source: Zhang et al. 2018, arXiv:1801.03924, eq. 1; numbers of the PyPI package
      lpips 0.1.4, LPIPS(net="alex"). IMMA's protocol: its eval/eval.py, all pairs.
    """
    file = _file(path)
    params = jax.tree.map(jnp.asarray, _read(file))
    provenance = {
        "backbone": "AlexNet, LPIPS v0.1",
        "version": hashlib.sha256(file.read_bytes()).hexdigest()[:12],
        "protocol": protocol,
    }
    stages = functools.partial(_alexnet_stages, params)
    return Distance("lpips", SIDE, stages, RANGES[protocol], provenance)


@jax.jit
def _alexnet_stages(params, x_BHWC):
    """Returns AlexNet's five stages, after their ReLU, unit and weighted, "B P C"."""
    shift, scale = (np.float32(v).reshape(1, 1, 1, 3) for v in (_SHIFT, _SCALE))
    h_BHWC, stages = (x_BHWC - shift) / scale, []
    for stage, (layer, (stride, pad, pooled, _)) in enumerate(_LAYERS.items()):
        if pooled:
            h_BHWC = nn.max_pool(h_BHWC, (3, 3), (2, 2))
        h_BHWC = lax.conv_general_dilated(
            h_BHWC,
            params[f"features.{layer}.weight"],
            (stride, stride),
            ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
            precision=lax.Precision.HIGHEST,
        )
        bias_C = params[f"features.{layer}.bias"]
        h_BHWC = nn.relu(h_BHWC + bias_C.reshape(1, 1, 1, -1))
        weight_11C = params[f"lin{stage}.weight"].reshape(1, 1, -1)
        stages.append(unit_channels(h_BHWC, weight_11C))
    return stages


def unit_channels(h_BHWC, weight_11C):
    """Returns unit channels times sqrt(weight / places), "B P C"."""
    B, H, W, C = h_BHWC.shape
    h_BPC = h_BHWC.reshape(B, H * W, C)
    length = jnp.sqrt(jnp.sum(h_BPC**2, axis=-1, keepdims=True))
    return h_BPC / (length + 1e-10) * jnp.sqrt(weight_11C / (H * W))


def pairwise(distance: Distance, images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns the distance of every image to every other one, float32 "N M".

    Images of another size than the distance's are resized by Pillow, bilinear and
    antialiased, to a square. The features of `images` are held: 0.1 MB each for LPIPS.

    Args: images: uint8 "N H W 3". others: uint8 "M H W 3", of any other size.
    Raises: UserError if either is empty.
    """
    if len(images) == 0 or len(others) == 0:
        raise UserError(f"{len(images)} images and {len(others)} references")

    def stages_of(batch):
        return distance.stages(_prepare(distance, batch))

    x_stages = map_batches(stages_of, images, BATCH)

    def to_all(batch):  # "B N"
        y_stages = stages_of(batch)
        rows = map_batches(lambda x: _distances(x, y_stages), x_stages, BATCH)
        return rows.T

    return map_batches(to_all, others, BATCH).T


@jax.jit
def _distances(x_stages, y_stages):
    """Returns "b B": one image of x at a time, so that no "b B P C" is held."""

    def to_all(x_PCs):
        both = zip(x_PCs, y_stages, strict=True)
        return sum(jnp.sum((x[None] - y) ** 2, axis=(1, 2)) for x, y in both)

    return lax.map(to_all, x_stages)


def _prepare(distance, images):
    low, high = distance.span
    side = distance.side
    if images.shape[1:3] != (side, side):
        size, box = (side, side), Image.Resampling.BILINEAR
        resized = [Image.fromarray(image).resize(size, box) for image in images]
        images = np.stack([np.asarray(image) for image in resized])
    return images.astype(np.float32) / (255 / (high - low)) + low


def results(distance: Distance, eval_set: EvalSet) -> list[MetricResult]:
    """Returns the distances to the references, the nearest training image, the twin.

    The second, if there are training images, tells copies: a copy is at 0. The third,
    if there are twins, is what `fidelity` measures, by this distance.
    """
    images, references = eval_set.images, eval_set.reference_images
    provenance = distance.provenance | {
        "resolution": distance.side,
        "input_range": list(distance.span),
        "resize": "Pillow bilinear, antialiased",
    }
    samples = pairwise(distance, images, references).mean(axis=1)
    own = provenance | {"pairs": "all", "references": len(references)}
    mean = mean_result(distance.name, samples, "less like the references", own)
    measured = [mean]
    if (training := eval_set.training_images) is not None:
        samples = pairwise(distance, images, training).min(axis=1)
        own = provenance | {"pairs": "the nearest", "training": len(training)}
        own["least"] = round(float(samples.min()), 6)
        name = f"{distance.name}_nearest_train"
        measured.append(mean_result(name, samples, "less like a training image", own))
    if (twins := eval_set.twin_images) is not None:
        pairs = zip(images, twins, strict=True)
        samples = [pairwise(distance, x[None], y[None])[0, 0] for x, y in pairs]
        own = provenance | {"pairs": "each image and its twin"}
        less = "less like the original's"
        name = f"{distance.name}_twin"
        measured.append(mean_result(name, np.asarray(samples), less, own))
    return measured


def measure(eval_set: EvalSet, settings: Settings, _) -> list[MetricResult]:
    distances = [load(settings.lpips, protocol) for protocol in settings.protocols]
    return [result for each in distances for result in results(each, eval_set)]


def check(_, settings: Settings) -> None:
    _file(settings.lpips)


METRIC = Metric(
    "lpips",
    "LPIPS to the references, and to the nearest training image",
    measure,
    needs=("reference_images",),
    check=check,
)


def _file(path):
    file = pathlib.Path(path or FILE)
    file = file / FILE if os.path.isdir(file) else file
    if not path or not os.path.isfile(file):
        raise UnavailableError(
            f"config.metrics.lpips={path!r}: no such file. It needs {FILE}, AlexNet's "
            "features and the learned weights in one; make it where torch, torchvision "
            f"and lpips are: python -c '{EXPORT}'"
        )
    return file


def _read(file):
    """Returns {name: float32 array} in PyTorch's layout, complete and checked."""
    shapes = {}
    for stage, (layer, (*_, shape)) in enumerate(_LAYERS.items()):
        shapes[f"features.{layer}.weight"] = shape
        shapes[f"features.{layer}.bias"] = shape[:1]
        shapes[f"lin{stage}.weight"] = (1, shape[0], 1, 1)
    entries, arrays = safetensors_io.read_header(file), {}
    for name, shape in shapes.items():
        if name not in entries or entries[name].shape != shape:
            actual = list(entries[name].shape) if name in entries else "missing"
            raise UserError(f"{file}: {name} is {actual}, must be {list(shape)}")
        array = safetensors_io.read_tensor(name, entries[name])
        arrays[name] = array.astype(np.float32)
        if name.startswith("lin") and arrays[name].min() < 0:
            raise UserError(f"{file}: {name} is negative somewhere; not LPIPS's")
    return arrays
