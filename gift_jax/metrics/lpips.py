# SPDX-License-Identifier: Apache-2.0
"""How far apart two pictures look: LPIPS, and the same sum on emoji-sd's own judge.

Both compare a network's features, stage by stage: channels at unit length, squared
differences, mean over places. LPIPS weighs AlexNet's channels by what people said and
needs a file; the judge's distance weighs all alike, needs none, and is not LPIPS.
"""

import dataclasses
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

from gift_jax.metrics import judge
from gift_jax.metrics.base import MetricResult, MissingWeights
from gift_jax.models import safetensors_io, vision, weights
from gift_jax.runtime.errors import UserError

FILE = "lpips_alex.safetensors"
BATCH = 16  # pictures of one compiled size
MAKE = (  # Python, where torch, torchvision and lpips are
    "import re, lpips, safetensors.torch as st; "
    'st.save_file({re.sub(r"net.slice\\d", "features", k).replace("model.1.", ""): v '
    'for k, v in lpips.LPIPS(net="alex").state_dict().items() '
    f'if re.match(r"net|lin\\d", k)}}, "{FILE}")'
)
RANGES = {"standard": (-1.0, 1.0), "imma-64px": (0.0, 1.0)}  # protocol: of the input
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
    """A perceptual distance of pictures.

    Attributes: name: of the metric. resolution: pixels a side that pictures are resized
      to. stages: float32 "B H W 3" in `span` -> `Stages`, scaled so that the distance
      of two pictures is the sum of squared differences. span: of the pixel values.
      how: what made it, for a Value.
    """

    name: str
    resolution: int
    stages: Callable[[np.ndarray], Stages]
    span: tuple[float, float]
    how: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Every generated picture against every reference, float32 "N M", in `matrix_NM`.

    Attributes: name: the distance's. how: with the counts, for a Value.
    """

    name: str
    matrix_NM: np.ndarray
    how: dict[str, Any]

    def mean(self) -> MetricResult:
        """Returns the mean over all pairs; samples: over each generated picture's."""
        samples = self.matrix_NM.mean(axis=1)
        how = self.how | {"pairs": "all"}
        value = float(np.mean(samples))
        return MetricResult(self.name, value, samples, "less like the references", how)

    def nearest(self) -> MetricResult:
        """Returns the mean over each generated picture's least, which are the samples.

        Of training pictures as the references it tells copies: a copy is at 0.
        """
        samples = self.matrix_NM.min(axis=1)
        least = round(float(samples.min()), 6)
        how = self.how | {"pairs": "the nearest reference", "least": least}
        name, value = f"{self.name}_nearest", float(np.mean(samples))
        return MetricResult(
            name, value, samples, "less copied from the references", how
        )


def load(
    path: str | pathlib.Path | None, *, protocol: str = "standard", resolution: int = 64
) -> Distance:
    """Returns LPIPS v0.1 on AlexNet.

    Args: path: `FILE`, or a folder with it, tensors named as torchvision's alexnet
        ("features.0.weight" ...) and "lin0.weight" ... "lin4.weight"; `MAKE` writes it.
      protocol: "standard": values in [-1, 1]; "imma-64px": 64 pixels and, by the
        mistake of IMMA's script, [0, 1].
      resolution: pixels a side, for "standard"; 64 is what LPIPS was learned on.
    Raises: MissingWeights if there is no such file. UserError for a tensor that is
      missing or of another shape, an unknown protocol, a resolution it does not take.
    Source: Zhang et al. 2018, arXiv:1801.03924, eq. 1; numbers of the PyPI package
      lpips 0.1.4, LPIPS(net="alex"). IMMA's protocol: its eval/eval.py, all pairs.
    """
    if protocol not in RANGES:
        raise UserError(f"protocol={protocol!r} must be one of {', '.join(RANGES)}")
    if resolution < 32 or (protocol == "imma-64px" and resolution != 64):
        raise UserError(f"resolution={resolution} must be 32 or more; imma-64px has 64")
    file = _file(path)
    params = jax.tree.map(jnp.asarray, _read(file))
    how = {
        "backbone": "AlexNet, LPIPS v0.1",
        "version": hashlib.sha256(file.read_bytes()).hexdigest()[:12],
        "protocol": protocol,
    }
    span = RANGES[protocol]
    return Distance("lpips", resolution, lambda x: _alex_jit(params, x), span, how)


def judge_distance(folder: pathlib.Path = judge.FOLDER) -> Distance:
    """Returns LPIPS's construction, unweighted, on the stages of the judge; no LPIPS.

    The stem and three residual stages, at 1/2 to 1/16 of the judge's 64 pixels.

    Raises: UserError if the folder or one of its files is missing or malformed, or its
      image tower is not convolutional.
    Source: ours; the stages of a `vision.clip.ConvTower` with the sum of `load`.
    """
    clip, params, _ = weights.load_component(folder, "clip")
    if not clip.config.vision_config.conv_channels:
        raise UserError(f"{folder}: its image tower is not convolutional")
    params = jax.tree.map(jnp.asarray, params)
    even = jnp.ones((1, 1, 1))

    @jax.jit
    def run(params, x_BHWC):
        stages = vision.apply_clip_stages(clip, params, x_BHWC)
        return [_scaled(h_BHWC, even) for h_BHWC in stages]

    how = {
        "backbone": "emoji-sd's judge, a small CLIP",
        "version": weights.content_hash(folder)[:12],
        "protocol": "standard",
        "note": "LPIPS's construction without learned weights; not LPIPS",
    }
    size = clip.config.vision_config.image_size
    span = RANGES["standard"]
    return Distance("judge_distance", size, lambda x: run(params, x), span, how)


def _alex_stages(params, x_BHWC):
    """Returns AlexNet's five stages, after their ReLU, unit and weighted, "B P C"."""
    shift, scale = (np.float32(v).reshape(1, 1, 1, 3) for v in (_SHIFT, _SCALE))
    h_BHWC, found = (x_BHWC - shift) / scale, []
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
        found.append(_scaled(h_BHWC, params[f"lin{stage}.weight"].reshape(1, 1, -1)))
    return found


_alex_jit = jax.jit(_alex_stages)


def _scaled(h_BHWC, weight_11C):
    """Returns unit channels times sqrt(weight / places), "B P C"."""
    B, H, W, C = h_BHWC.shape
    h_BPC = h_BHWC.reshape(B, H * W, C)
    length = jnp.sqrt(jnp.sum(h_BPC**2, axis=-1, keepdims=True))
    return h_BPC / (length + 1e-10) * jnp.sqrt(weight_11C / (H * W))


def pairs(distance: Distance, generated: np.ndarray, references: np.ndarray) -> Pairs:
    """Returns the distance of every generated picture to every reference.

    Pictures of another size than the distance's are resized by Pillow, bilinear and
    antialiased, to a square. The generated ones' features are held: 0.1 MB a picture
    for LPIPS at 64 pixels, 11 MB at 512.

    Args: generated: uint8 "N H W 3". references: uint8 "M H W 3", of any other size.
    Raises: UserError if either has no pictures.
    """
    if len(generated) == 0 or len(references) == 0:
        raise UserError(f"{len(generated)} pictures and {len(references)} references")
    held = list(_batches(distance, generated))
    columns = []
    for y in _batches(distance, references):
        rows = [np.asarray(_pairs_jit(x, y)) for x in held]
        columns.append(np.concatenate(rows)[: len(generated)])
    matrix_NM = np.concatenate(columns, axis=1)[:, : len(references)]
    return Pairs(distance.name, matrix_NM, _how(distance, generated, references))


@jax.jit
def _pairs_jit(x_stages, y_stages):
    """Returns "b B": one picture of x at a time, so that no "b B P C" is held."""

    def one(x_PCs):
        both = zip(x_PCs, y_stages, strict=True)
        return sum(jnp.sum((x[None] - y) ** 2, axis=(1, 2)) for x, y in both)

    return lax.map(one, x_stages)


def _batches(distance, images):
    """Yields the stages of `BATCH` pictures after `BATCH`, the last one repeated."""
    low, high = distance.span
    for first in range(0, len(images), BATCH):
        rows = np.minimum(np.arange(first, first + BATCH), len(images) - 1)
        x_BHWC = _resized(images[rows], distance.resolution).astype(np.float32)
        yield distance.stages(x_BHWC / (255 / (high - low)) + low)


def _resized(images, size):
    if images.shape[1:3] == (size, size):
        return images
    pictures = [Image.fromarray(image) for image in images]
    resized = [p.resize((size, size), Image.Resampling.BILINEAR) for p in pictures]
    return np.stack([np.asarray(p) for p in resized])


def _how(distance, generated, references):
    size = distance.resolution
    sizes = {f"{x.shape[1]}x{x.shape[2]}" for x in (generated, references)}
    resized = " and ".join(sorted(sizes - {f"{size}x{size}"}))
    resize = f"Pillow bilinear, antialiased, from {resized}" if resized else "none"
    return distance.how | {
        "resolution": size,
        "input_range": list(distance.span),
        "resize": resize,
        "n_generated": len(generated),
        "n_references": len(references),
    }


def _file(path):
    file = pathlib.Path(path or FILE)
    file = file / FILE if os.path.isdir(file) else file
    if path is None or not os.path.isfile(file):
        raise MissingWeights(
            f"lpips={path}: no such file. It wants {FILE}, AlexNet's features and the "
            "learned weights in one; make it where torch, torchvision and lpips are: "
            f"python -c '{MAKE}'"
        )
    return file


def _read(file):
    """Returns {name: float32 array} in PyTorch's layout, complete and checked."""
    shapes = {}
    for stage, (layer, (*_, shape)) in enumerate(_LAYERS.items()):
        shapes[f"features.{layer}.weight"] = shape
        shapes[f"features.{layer}.bias"] = shape[:1]
        shapes[f"lin{stage}.weight"] = (1, shape[0], 1, 1)
    entries, found = safetensors_io.read_header(file), {}
    for name, shape in shapes.items():
        if name not in entries or entries[name].shape != shape:
            has = list(entries[name].shape) if name in entries else "missing"
            raise UserError(f"{file}: {name} is {has}, must be {list(shape)}")
        array = safetensors_io.read_tensor(name, entries[name])
        found[name] = array.astype(np.float32)
        if name.startswith("lin") and found[name].min() < 0:
            raise UserError(f"{file}: {name} is negative somewhere; not LPIPS's")
    return found
