# SPDX-License-Identifier: Apache-2.0
"""Image backbones that pictures are compared by: CLIP, DINO, DINOv2, and the judge.

A backbone is read from a folder of transformers' safetensors into its Flax modules, and
says of itself all that another person needs to get the same embeddings.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gift_jax.metrics import judge, preprocessing, pretrained
from gift_jax.models import vision, weights
from gift_jax.models.tokenizer import load_tokenizer
from gift_jax.runtime.errors import UserError

PROTOCOLS = ("standard", "imma-64px")
BATCH = 16  # pictures, or texts, in one call; fewer are padded to it
KINDS = {  # what config.json calls the architecture: kind of backbone
    "CLIPModel": "clip",
    "ConvClip": "judge",
    "ViTModel": "dino",
    "Dinov2Model": "dinov2",
}
_TEXT_FILES = ("vocab.json", "merges.txt")
_FILES = {
    "clip": ("config.json", "preprocessor_config.json", *_TEXT_FILES),
    "judge": ("config.json", *_TEXT_FILES),
    "dino": ("config.json", "preprocessor_config.json"),
    "dinov2": ("config.json", "preprocessor_config.json"),
}
_OPTIONAL = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_NEEDED = (
    "config.json, preprocessor_config.json, model.safetensors and, for CLIP, "
    "vocab.json and merges.txt"
)
_WANTED = pretrained.Wanted("backbone", KINDS, _FILES, _OPTIONAL, _NEEDED)


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """A model that embeds pictures, and texts if it was trained to.

    Attributes: kind: "clip", "dino", "dinov2" or "judge". name: hub id, or the folder's
      name. version: of its files, 12 hex digits. resolution: what the model takes, in
      pixels. protocol: of `PROTOCOLS`. images: uint8 "B H W 3" -> unit float32 "B D".
      texts: strings -> unit float32 "B D"; None without a text tower. logit_scale: by
      which it multiplies cosines; None without a text tower.
    """

    kind: str
    name: str
    version: str
    resolution: int
    protocol: str
    images: Callable[[np.ndarray], np.ndarray]
    texts: Callable[[Sequence[str]], np.ndarray] | None
    logit_scale: float | None

    @property
    def how(self) -> dict[str, Any]:
        """What a Value's `how` says of the backbone."""
        fields = ("name", "version", "resolution", "protocol")
        said = {field: getattr(self, field) for field in fields}
        return {"backbone": said.pop("name")} | said


# --- loading --------------------------------------------------------------------------


def load(spec: str, protocol: str = "standard") -> Backbone:
    """Returns the backbone of that name, its weights in memory.

    Args: spec: "judge", which ships with the package; a folder of transformers'
        CLIPModel, ViTModel (DINO) or Dinov2Model; or the hub id of one, "org/name" or
        "org/name@revision": openai/clip-vit-base-patch32, facebook/dino-vits16 ...
      protocol: "standard": short side resized with the model's filter, centre crop, its
        mean and std; DINO: to 256/224 of the model's side, bicubic. "imma-64px": see
        `pixels.imma_64px`. The judge has "standard" only: its own 64 px, in [-1, 1].
    Raises: MissingWeights if the folder, one of its files or the hub's model is not
      here, or has only pickles. UserError for an unknown protocol, an architecture or
      setting that is not supported, and for malformed files.
    Source: embeddings equal transformers' CLIPModel.get_image_features,
      get_text_features and the class token of ViTModel and Dinov2Model, in PyTorch.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol={protocol!r} must be one of {', '.join(PROTOCOLS)}")
    folder, name = judge.FOLDER, "judge"
    if spec != "judge":
        folder, name = pretrained.find(spec, _WANTED)
    kind = pretrained.check(folder, spec, _WANTED)
    towers = _clip_towers if kind in ("clip", "judge") else _vision_tower
    image, text, logit_scale, how = towers(folder, kind)
    if protocol == "standard":
        prepare = functools.partial(preprocessing.standard, pixels=how)
    elif kind == "judge":
        raise UserError(f"protocol={protocol!r}: the judge knows standard only")
    else:
        prepare = functools.partial(preprocessing.imma_64px, side=how.side)

    def embed_images(images: np.ndarray) -> np.ndarray:
        return of_pictures(image, images, prepare)

    version = weights.content_hash(folder)[:12]
    return Backbone(
        kind, name, version, how.side, protocol, embed_images, text, logit_scale
    )


def _clip_towers(folder, kind):
    """Returns (pixels -> embeddings, texts -> embeddings, logit scale, Pixels)."""
    clip, params, _ = weights.load_component(folder, "clip")
    size = clip.config.vision_config.image_size
    how = (
        preprocessing.judge(size) if kind == "judge" else _own_size(folder, kind, size)
    )
    logit_scale = float(np.exp(params["logit_scale"]))
    params = jax.tree.map(jnp.asarray, params)
    tokenizer = load_tokenizer(folder)
    length = clip.config.text_config.max_position_embeddings
    image = jax.jit(lambda p, x: _unit(vision.apply_clip_image(clip, p, x)))
    text = jax.jit(lambda p, ids: _unit(vision.apply_clip_text(clip, p, ids)))

    def embed_texts(texts: Sequence[str]) -> np.ndarray:
        ids = tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length
        ).input_ids
        return _in_batches(functools.partial(text, params), np.asarray(ids, np.int32))

    return functools.partial(image, params), embed_texts, logit_scale, how


def _vision_tower(folder, kind):
    """Returns (pixels -> embeddings, None, None, Pixels) of a ViT or DINOv2."""
    component = {"dino": "vit", "dinov2": "dinov2"}[kind]
    model, params, config = weights.load_component(folder, component)
    size, patch = model.config.image_size, model.config.patch_size
    if kind == "dino":
        how = _own_size(folder, kind, size)
    else:
        how = preprocessing.read(folder)
        table = params["embeddings"]["position_embeddings"]
        table = resize_positions(table, how.side // patch)
        params["embeddings"]["position_embeddings"] = table
        model = vision.build_dinov2(config | {"image_size": how.side})
    params = jax.tree.map(jnp.asarray, params)
    image = jax.jit(lambda p, x: _unit(vision.apply_vision(model, p, x)))
    return functools.partial(image, params), None, None, how


def _own_size(folder, kind, image_size):
    """Returns the folder's Pixels; UserError if not of the model's own size."""
    how = preprocessing.read(folder, image_size if kind == "dino" else 0)
    return preprocessing.of_size(folder, how, image_size)


def resize_positions(table, patches):
    """Returns a position table "1 N D" for another number of patches a side.

    Source: transformers' Dinov2Embeddings.interpolate_pos_encoding (Flax's own has
      another cubic and another scale).
    """
    own = round((table.shape[1] - 1) ** 0.5)
    if patches == own:
        return table
    grid = table[0, 1:].reshape(own, own, -1)
    resize = preprocessing.cubic_matrix(own, patches)
    grid = np.einsum("ih,jw,hwd->ijd", resize, resize, grid, optimize=True)
    grid = grid.reshape(1, patches * patches, -1)
    return np.concatenate([table[:, :1], grid], axis=1).astype(np.float32)


def _unit(x_BD):
    return x_BD / jnp.linalg.norm(x_BD, axis=-1, keepdims=True)


def of_pictures(
    function: Callable, images: np.ndarray, prepare: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Returns function(prepare(images)), "B D", of uint8 "B H W 3" pictures."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"{images.dtype} {images.shape}: not uint8 'B H W 3'")
    return _in_batches(function, images, prepare)


def _in_batches(function, rows, prepare=lambda part: part):
    """Returns function(prepare(rows)), `BATCH` rows at a time: it compiles once."""
    if not len(rows):
        raise UserError("no pictures or texts to embed; at least one is needed")
    parts = []
    for first in range(0, len(rows), BATCH):
        part = prepare(rows[first : first + BATCH])
        padding = [(0, BATCH - len(part))] + [(0, 0)] * (part.ndim - 1)
        padded = np.pad(part, padding, mode="edge")
        parts.append(np.asarray(function(padded))[: len(part)])
    return np.concatenate(parts)
