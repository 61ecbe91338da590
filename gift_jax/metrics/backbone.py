# SPDX-License-Identifier: Apache-2.0
"""Image backbones that images are compared by: CLIP, DINO, DINOv2, and the judge.

A backbone is read from a folder of transformers' safetensors, and says of itself all
that another person needs to get the same embeddings.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gift_jax.metrics import preprocessing, pretrained, towers
from gift_jax.models import weights
from gift_jax.models.batching import map_batches
from gift_jax.runtime.errors import UserError

BATCH = 16  # images, or texts, in one call
JUDGE = Path(__file__).resolve().parents[1] / "assets" / "judge"
KINDS = {  # what config.json calls the architecture: kind of backbone
    "CLIPModel": "clip",
    "ConvClip": "judge",
    "ViTModel": "dino",
    "Dinov2Model": "dinov2",
}
IMAGES = tuple(KINDS.values())  # the kinds that embed images: all
TEXTS = ("clip", "judge")  # the kinds that embed texts too
_REQUIRED = pretrained.Requirements(
    field="backbone",
    kinds=KINDS,
    files={
        "clip": (
            *("config.json", "preprocessor_config.json"),
            *("vocab.json", "merges.txt"),
        ),
        "judge": ("config.json",),
        "dino": ("config.json", "preprocessor_config.json"),
        "dinov2": ("config.json", "preprocessor_config.json"),
    },
    optional=(
        *("tokenizer.json", "tokenizer_config.json"),
        *("special_tokens_map.json", "added_tokens.json"),
    ),
    instead={"vocab.json": "tokenizer.json", "merges.txt": "tokenizer.json"},
    description=(
        "config.json, preprocessor_config.json, model.safetensors and, for CLIP, "
        "vocab.json and merges.txt, or tokenizer.json"
    ),
)


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """A model that embeds images, and texts if it was trained to.

    Attributes:
      kind: "clip", "dino", "dinov2" or "judge". name: hub id, or the folder's name.
      version: of its files, 12 hex digits. resolution: what the model takes, in pixels.
      protocol: of `preprocessing.PROTOCOLS`.
      features: uint8 "B H W 3" -> float32 "B D", as the model gives them, of whole
        images squeezed to its square: what distances of distributions are made of.
      images: uint8 "B H W 3" -> unit float32 "B D", prepared as its reference does.
      texts: strings -> unit float32 "B D"; None without a text tower. logit_scale: by
        which it multiplies cosines; None without a text tower.
    """

    kind: str
    name: str
    version: str
    resolution: int
    protocol: str
    features: Callable[[np.ndarray], np.ndarray]
    images: Callable[[np.ndarray], np.ndarray]
    texts: Callable[[Sequence[str]], np.ndarray] | None
    logit_scale: float | None

    @property
    def provenance(self) -> dict[str, Any]:
        """What a result's provenance says of the backbone."""
        return {
            "backbone": self.name,
            "version": self.version,
            "resolution": self.resolution,
            "protocol": self.protocol,
        }


def load(spec: str, protocol: str = "standard") -> Backbone:
    """Returns the backbone of that name, its weights in memory.

    Args: spec: "judge", which ships with the package; a folder of transformers'
        CLIPModel, ViTModel (DINO) or Dinov2Model; or the hub id of one, "org/name" or
        "org/name@revision": openai/clip-vit-base-patch32, facebook/dino-vits16 ...
      protocol: "standard": short side resized with the model's filter, center crop, its
        mean and std; DINO: to 256/224 of the model's side, bicubic. "imma-64px": see
        `preprocessing.imma_64px`. The judge has "standard" only: its own 64 px, in
        [-1, 1].
    Raises: UnavailableError if the folder, one of its files or the hub's model is not
      here, or has only pickles. UserError for an unknown protocol, an architecture or
      setting that is not supported, and for malformed files.
    Source: embeddings equal transformers' CLIPModel.get_image_features,
      get_text_features and the class token of ViTModel and Dinov2Model, in PyTorch.
    """
    if protocol not in preprocessing.PROTOCOLS:
        choices = ", ".join(preprocessing.PROTOCOLS)
        raise UserError(f"protocol={protocol!r} must be one of {choices}")
    folder, name = (JUDGE, "judge")
    if spec != "judge":
        folder, name = pretrained.locate(spec, _REQUIRED)
    kind = pretrained.check(folder, spec, _REQUIRED)
    if kind == "judge":
        if protocol != "standard":
            raise UserError(f"protocol={protocol!r}: the judge knows standard only")
        return dataclasses.replace(_judge(folder), name=name)
    version = weights.content_hash(folder)[:12]
    if kind == "clip":
        clip = towers.clip(folder)
        steps = preprocessing.read(folder)
        preprocessing.check_size(folder, steps, clip.size)
        return _of_clip(clip, steps, kind, name, version, protocol)
    tower, steps = _vision_tower(folder, kind)
    features, images = _embedders(tower, steps, protocol)
    side = steps.side
    return Backbone(kind, name, version, side, protocol, features, images, None, None)


@functools.lru_cache(maxsize=2)  # the judge is asked for as a backbone and for names
def _judge(folder: Path) -> Backbone:
    clip = towers.judge(folder)
    hashes = [weights.content_hash(path) for path in towers.judge_folders(folder)]
    version = hashlib.sha256("".join(hashes).encode()).hexdigest()[:12]
    steps = preprocessing.judge(clip.size)
    return _of_clip(clip, steps, "judge", "judge", version, "standard")


def _of_clip(clip: towers.Clip, steps, kind, name, version, protocol) -> Backbone:
    features, images = _embedders(clip.image, steps, protocol)

    def texts(strings: Sequence[str]) -> np.ndarray:
        _check_some(strings)
        with jax.default_matmul_precision("highest"):
            return unit(map_batches(clip.text, clip.tokenize(list(strings)), BATCH))

    scale = clip.logit_scale
    return Backbone(
        kind, name, version, steps.side, protocol, features, images, texts, scale
    )


def _vision_tower(folder, kind):
    """Returns (tower, Preprocessing) of a ViT or DINOv2."""
    if kind == "dinov2":
        steps = preprocessing.read(folder)
        return towers.class_token(folder, kind, steps.side)[0], steps
    tower, size = towers.class_token(folder, kind)
    steps = preprocessing.read(folder, dino_side=size)
    return tower, preprocessing.check_size(folder, steps, size)


def _embedders(tower, steps, protocol):
    """Returns (features, images) of a `Backbone`."""
    if protocol == "imma-64px":
        prepare = squeeze = functools.partial(preprocessing.imma_64px, side=steps.side)
    else:
        prepare = functools.partial(preprocessing.standard, steps=steps)
        squeeze = functools.partial(preprocessing.standard, steps=steps.squeezed())
    return (
        lambda images: embed(tower, images, squeeze),
        lambda images: unit(embed(tower, images, prepare)),
    )


def embed(tower: Callable, images: np.ndarray, prepare: Callable) -> np.ndarray:
    """Returns tower(prepare(images)), "B D", of uint8 "B H W 3" images."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"{images.dtype} {images.shape}: not uint8 'B H W 3'")
    _check_some(images)
    with jax.default_matmul_precision("highest"):  # TPUs and GPUs round otherwise
        return map_batches(lambda part: tower(prepare(part)), images, BATCH)


def unit(x_BD: np.ndarray) -> np.ndarray:
    """Returns the vectors at length 1."""
    return x_BD / np.linalg.norm(x_BD, axis=-1, keepdims=True)


def _check_some(rows) -> None:
    if not len(rows):
        raise UserError("no images or texts to embed; at least one is needed")
