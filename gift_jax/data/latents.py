# SPDX-License-Identifier: Apache-2.0
"""The latent cache: pictures and prompts are encoded once, before the loop.

A training step then sees the denoiser only: it draws `mean + std * noise` itself, so
the cache loses nothing of the VAE's posterior.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from gift_jax.data import augment, pipeline
from gift_jax.runtime.errors import UserError


def cache_latents(
    encode_images,
    encode_prompts,
    data,
    *,
    copies=1,
    key=None,
    batch_size=32,
    prompts=None,
    **strengths,
):
    """Encodes every pair of a `Pairs`, in batches of one size.

    Args: encode_images: float32 "B H W 3" in [-1, 1] -> (mean, std), each "B ...".
      encode_prompts: list of B strings -> cond, a pytree "B ..."; or ids, "B L". Both
        see only batches of `batch_size` (the last one padded), so each compiles once.
      copies: how often a picture appears; the first time as it is, then augmented,
        drawn from `key`.
      prompts: one a row, in place of the pairs' own.
      strengths: of the augmentation, by the names that `augment.augment` gives them.
    Returns: dict of arrays, copies * N rows, copy by copy: `mean` and `std`, float32
      "N ..."; `cond`, a `pipeline.DeduplicatedArray` (a prompt of SD takes 0.24 MB);
      `concept`, int32 "N", indices into `data.concept_names`. The rows do not
      depend on batch_size.
    Raises: UserError if there is no data or copies < 1; ValueError if copies > 1 comes
      without a key.
    """
    if copies < 1:
        raise UserError(f"copies={copies} must be at least 1")
    if len(data) == 0:
        raise UserError("there are no pictures to encode")
    if copies > 1 and key is None:
        raise ValueError("augmented copies need a key")
    draw = functools.partial(augment.augment, **strengths)
    draw = jax.jit(draw)
    encoded = [encode_in_batches(encode_images, data.images, batch_size)]
    for copy in range(1, copies):
        transform = _augmented(draw, jax.random.fold_in(key, copy), data.may_flip)
        encoded.append(
            encode_in_batches(
                encode_images, data.images, batch_size, transform=transform
            )
        )
    prompts = data.prompts * copies if prompts is None else prompts
    cond = encode_unique_prompts(encode_prompts, prompts, batch_size)
    logging.info("cached %d latents (%d pictures)", copies * len(data), len(data))
    return {
        "mean": np.concatenate([mean for mean, _ in encoded]),
        "std": np.concatenate([std for _, std in encoded]),
        "cond": cond,
        "concept": np.tile(data.concept_ids, copies),
    }


def encode_in_batches(encode_images, images, batch_size, *, transform=None):
    """Returns (mean, std), float32 "N ...", of uint8 "N H W 3" pictures.

    Args: transform: optional (images float32 "B H W 3", index int "B") -> images,
      applied before encoding; index is a picture's row.
    """
    means, stds = [], []
    for rows in _padded_rows(len(images), batch_size):
        images_BHWC = to_float(images[rows])
        if transform is not None:
            images_BHWC = transform(images_BHWC, rows)
        mean, std = encode_images(images_BHWC)
        means.append(np.asarray(mean, np.float32))
        stds.append(np.asarray(std, np.float32))
    count = len(images)
    return np.concatenate(means)[:count], np.concatenate(stds)[:count]


def encode_unique_prompts(encode_prompts, prompts, batch_size):
    """Returns a `pipeline.DeduplicatedArray`: each distinct prompt is encoded once.

    float32; or integers as they are.
    """
    distinct = list(dict.fromkeys(prompts))
    parts = []
    for rows in _padded_rows(len(distinct), batch_size):
        cond = encode_prompts([distinct[row] for row in rows])
        parts.append(jax.tree.map(_as_float32, cond))
    table = jax.tree.map(lambda *a: np.concatenate(a)[: len(distinct)], *parts)
    row_of = {prompt: row for row, prompt in enumerate(distinct)}
    return pipeline.DeduplicatedArray(table, np.asarray([row_of[p] for p in prompts]))


def _as_float32(array):
    array = np.asarray(array)
    is_integer = np.issubdtype(array.dtype, np.integer)
    return array if is_integer else array.astype(np.float32, copy=False)


def to_float(images):
    """Returns float32 in [-1, 1] of uint8 pictures."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def _augmented(draw, key, may_flip):
    def transform(images_BHWC, index_B):
        return draw(key, images_BHWC, may_flip[index_B], index_B=index_B)

    return transform


def _padded_rows(count, batch_size):
    """Yields int "batch_size" row numbers; the last batch repeats its last row."""
    for start in range(0, count, batch_size):
        yield np.minimum(np.arange(start, start + batch_size), count - 1)
