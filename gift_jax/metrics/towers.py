# SPDX-License-Identifier: Apache-2.0
"""The networks of the metrics, read from their folders: the one place that builds them.

Each is a jitted function of arrays, its weights held. Numbers are those of the PyTorch
models of the same name.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gift_jax.metrics import preprocessing
from gift_jax.models import safetensors_io, vision, weights
from gift_jax.models.params import parameter_shapes
from gift_jax.models.tokenizer import load_tokenizer
from gift_jax.runtime.errors import UserError

_MODEL = "emoji-sd"  # beside the judge: whose text encoder and tokenizer it shares


class Clip(NamedTuple):
    """A two-tower CLIP.

    Attributes:
      image: float32 "B 3 S S" -> embeddings "B D". text: int32 "B L" -> "B D"; neither
        normalized. tokenize: strings -> int32 "B L". size: S, in pixels.
      logit_scale: by which it multiplies cosines.
    """

    image: Callable[[jax.Array], jax.Array]
    text: Callable[[jax.Array], jax.Array]
    tokenize: Callable[[list[str]], np.ndarray]
    size: int
    logit_scale: float


def clip(folder: Path) -> Clip:
    """Returns the CLIP of a folder of transformers' CLIPModel."""
    module, params, _ = weights.load_component(folder, "clip")
    return _clip(module, params, folder)


def judge(folder: Path) -> Clip:
    """Returns the judge, see `_judge`."""
    module, params = _judge(folder)
    return _clip(module, params, folder.parent / _MODEL / "tokenizer")


def judge_folders(folder: Path) -> list[Path]:
    """Returns every folder that the judge is read from."""
    model = folder.parent / _MODEL
    return [folder, model / "text_encoder", model / "tokenizer"]


def _clip(module, params, tokenizer_folder):
    logit_scale = float(np.exp(params["logit_scale"]))
    params = jax.tree.map(jnp.asarray, params)
    tokenizer = load_tokenizer(tokenizer_folder, any_length=True)
    length = module.config.text_config.max_position_embeddings
    image = jax.jit(lambda p, x_BCHW: vision.apply_clip_image(module, p, x_BCHW))
    text = jax.jit(lambda p, ids_BL: vision.apply_clip_text(module, p, ids_BL))

    def tokenize(texts):
        ids = tokenizer(
            texts, padding="max_length", truncation=True, max_length=length
        ).input_ids
        return np.asarray(ids, np.int32)

    return Clip(
        functools.partial(image, params),
        functools.partial(text, params),
        tokenize,
        module.config.vision_config.image_size,
        logit_scale,
    )


def _judge(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Returns (module, parameters) of emoji-sd's judge, a CLIP of a `ConvTower`.

    Its folder holds the image tower and the projections; the text tower is the text
    encoder of the model "emoji-sd" beside it.

    Raises: UserError if a tensor is missing or of another shape.
    """
    config = safetensors_io.read_json(folder / "config.json")
    module = vision.build_clip(config)
    text_folder = folder.parent / _MODEL / "text_encoder"
    _, text, _ = weights.load_component(text_folder, "text_encoder")
    params = flatten_dict(text, sep="/")
    file = folder / "model.safetensors"
    entries = safetensors_io.read_header(file)
    shapes = flatten_dict(parameter_shapes(module), sep="/")
    for path, leaf in shapes.items():
        if path not in params:
            name = safetensors_io.torch_name(path)
            if name not in entries:
                raise UserError(f"{file}: {name} is missing")
            array = safetensors_io.read_tensor(name, entries[name])
            params[path] = weights.to_flax(path, array).astype(np.float32)
        if params[path].shape != leaf.shape:
            raise UserError(
                f"{file}: {path} has shape {list(params[path].shape)}, config.json "
                f"says {list(leaf.shape)}"
            )
    return module, unflatten_dict(params, sep="/")


def judge_stages(folder: Path) -> tuple[Callable, int]:
    """Returns (float32 "B H W 3" in [-1, 1] -> stages, the image size) of the judge.

    The stem and three residual stages as the image tower computes them, float32
    "B h w C" each, at 1/2 to 1/16 of the image.
    """
    module, params = _judge(folder)
    params = jax.tree.map(jnp.asarray, params)

    stages = jax.jit(lambda p, x_BHWC: vision.apply_clip_stages(module, p, x_BHWC))
    return functools.partial(stages, params), module.config.vision_config.image_size


def class_token(folder: Path, kind: str, side: int = 0) -> tuple[Callable, int]:
    """Returns (float32 "B 3 S S" -> class token "B D", S) of a ViT or a DINOv2.

    Args: kind: "dino" or "dinov2". side: S in pixels, for "dinov2"; its positions are
      resized to it.
    """
    component = {"dino": "vit", "dinov2": "dinov2"}[kind]
    module, params, config = weights.load_component(folder, component)
    size, patch = module.config.image_size, module.config.patch_size
    if kind == "dinov2":
        size = side
        table = params["embeddings"]["position_embeddings"]
        table = resize_positions(table, side // patch)
        params["embeddings"]["position_embeddings"] = table
        module = vision.build_dinov2(config | {"image_size": side})
    params = jax.tree.map(jnp.asarray, params)
    image = jax.jit(lambda p, x_BCHW: vision.apply_vision(module, p, x_BCHW))
    return functools.partial(image, params), size


def classifier(folder: Path, kind: str) -> tuple[Callable, int]:
    """Returns (float32 "B 3 S S" -> logits "B N", S) of a ViT or a ResNet.

    Args: kind: "vit_classifier" or "resnet_classifier", which takes any S, given as 0.
    """
    module, params, _ = weights.load_component(folder, kind)
    size = module.config.image_size if kind == "vit_classifier" else 0
    params = jax.tree.map(jnp.asarray, params)
    logits = jax.jit(lambda p, x_BCHW: vision.apply_classifier(module, p, x_BCHW))
    return functools.partial(logits, params), size


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
