# SPDX-License-Identifier: Apache-2.0
"""Backbones whose embeddings a test chooses."""

import numpy as np

from gift_jax.metrics import backbone


def fixed(kind, embeddings, texts=None, resolution=224):
    """A Backbone whose images, of one color that is their index, have these embeddings.

    Args: texts: embeddings of the prompts, in the order in which they are asked for.
    """
    unit_texts = None if texts is None else backbone.unit(texts)

    def features(images):
        return np.asarray(embeddings)[images[:, 0, 0, 0]]

    return backbone.Backbone(
        kind,
        "org/name",
        "0123456789ab",
        resolution,
        "standard",
        features,
        lambda images: backbone.unit(features(images)),
        None if texts is None else lambda prompts: unit_texts[: len(prompts)],
        None if texts is None else 100.0,
    )


def numbered(*ids):
    """Images "N 2 2 3" of these colors."""
    return np.tile(np.uint8(ids).reshape(-1, 1, 1, 1), (1, 2, 2, 3))
