# SPDX-License-Identifier: Apache-2.0
"""Is it a copy? The likeness to the closest training image."""

import numpy as np

from gift_jax.metrics.backbone import IMAGES, Backbone
from gift_jax.metrics.base import EvalSet, Metric, MetricResult, mean_result


def nearest_images(
    backbone: Backbone, images: np.ndarray, training: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (cosine, float32 "B"; index, int "B") of the closest training images.

    Args: images: uint8 "B H W 3". training: uint8 "T H W 3".
    """
    cosine_BT = backbone.images(images) @ backbone.images(training).T
    return cosine_BT.max(axis=1), cosine_BT.argmax(axis=1)


def measure(eval_set: EvalSet, _, backbone: Backbone) -> list[MetricResult]:
    """Returns "clip_nearest_train", "dino_nearest_train" ...: how near a copy each is.

    Source: Somepalli et al. 2023, arXiv:2212.03860, with other backbones.
    """
    training = eval_set.training_images
    cosine_B, _ = nearest_images(backbone, eval_set.images, training)
    provenance = backbone.provenance | {
        "scale": "cosine to the closest",
        "training": len(training),
    }
    name = f"{backbone.kind}_nearest_train"
    return [mean_result(name, cosine_B, "like a training image", provenance)]


METRIC = Metric(
    "nearest",
    "cosine to the closest training image",
    measure,
    needs=("training_images",),
    backbones=IMAGES,
)
