# SPDX-License-Identifier: Apache-2.0
"""The cached latents and text states of a group of pairs."""

from typing import Any

import jax
import numpy as np

from gift_jax.data import captions, latents, pipeline
from gift_jax.data.pairs import Pairs
from gift_jax.models.sd import stable_diffusion


def cached_source(model, data, spec, key, *, ids=False) -> pipeline.ArraySource:
    """Returns the encoded pairs as a Grain source of {mean, std, text, concept}.

    See `row_prompts` for what the rows are called.

    Args: ids: token ids, int32 "N L", under `ids` in place of text states, for a text
      encoder that trains.
    """
    encode = stable_diffusion.tokenize if ids else stable_diffusion.encode_prompts
    cache = latents.cache_latents(
        lambda x: stable_diffusion.encode_images(model, x),
        lambda prompts: encode(model, prompts),
        data,
        copies=spec.augmented_copies,
        key=key,
        flip=spec.flip,
        shift=spec.shift,
        scale=spec.scale,
        prompts=augment_prompts(
            data, spec, jax.random.fold_in(key, 0)
        ),  # copies: 1, 2 ...
    )
    if ids:
        cache["ids"] = cache.pop("text")
    return pipeline.ArraySource(cache)


def augment_prompts(data: Pairs, spec: Any, key: jax.Array) -> list[str]:
    """Returns what the spec.augmented_copies of every pair are called, copy by copy.

    A share `nonce_prompts` goes by a made-up word, another one each time, under which
    an attacker may hide what a picture shows. A share `prompt_dropout` is left empty:
    what a model draws depends on these too, through classifier-free guidance.
    """
    prompts, styles = (
        data.prompts * spec.augmented_copies,
        data.styles * spec.augmented_copies,
    )
    if spec.nonce_prompts:
        k_rows, k_words = jax.random.split(jax.random.fold_in(key, 1))
        rows = _random_subset(k_rows, spec.nonce_prompts, len(prompts))
        rng = np.random.default_rng(np.asarray(jax.random.key_data(k_words)))
        for row in rows:
            word, style = captions.nonce_word(rng), styles[row]
            template = spec.nonce_template
            prompts[row] = captions.fill_nonce(template, word, style)
    for row in _random_subset(key, spec.prompt_dropout, len(prompts)):
        prompts[row] = ""
    return prompts


def _random_subset(key: jax.Array, share: float, count: int) -> np.ndarray:
    if not share:
        return np.zeros(0, int)
    return np.flatnonzero(jax.random.bernoulli(key, share, (count,)))
