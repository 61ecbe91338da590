# SPDX-License-Identifier: Apache-2.0
"""How alike pictures are to texts, to references, and to what was trained on."""

from collections.abc import Sequence

import numpy as np

from gift_jax.metrics import backbone
from gift_jax.metrics.base import MetricResult
from gift_jax.runtime.errors import UserError


def text_image(
    backbone: backbone.Backbone, images: np.ndarray, prompts: Sequence[str]
) -> MetricResult:
    """Returns "clip_score" (or "judge_score"): how well pictures fit their prompts.

    Args: images: uint8 "B H W 3". prompts: B texts, one of each picture.
    Returns: 100 x the cosine of picture and prompt, mean over the pictures, nothing
      clipped: transformers' logits_per_image where CLIP's logit scale is 100, and what
      torchmetrics says where that is not below 0, at which it clips the mean. A prompt
      too long for the model is cut off before its end token, which stays.
    Raises: UserError if the backbone has no text tower, or there is not one prompt per
      picture.
    Source: Hessel et al. 2021, arXiv:2104.08718, with 100 in place of 2.5; torchmetrics
      CLIPScore; UCE's eval-scripts/mean_clip.py,
      https://github.com/rohitgandikota/unified-concept-editing.
    """
    if backbone.texts is None:
        raise UserError(
            f"backbone={backbone.name!r} embeds no texts; a score of prompts needs a "
            'CLIP or "judge"'
        )
    if len(prompts) != len(images):
        raise UserError(
            f"{len(images)} pictures, but {len(prompts)} prompts; must be as many"
        )
    cosine_B = np.sum(backbone.images(images) * backbone.texts(prompts), axis=-1)
    how = {
        "scale": "100 x cosine, not clipped at 0",
        "logit_scale": round(backbone.logit_scale, 4),
    }
    return _value("score", 100.0 * cosine_B, "fits the prompt", backbone, how)


def image_image(
    backbone: backbone.Backbone, images: np.ndarray, references: np.ndarray
) -> MetricResult:
    """Returns "clip_i", "dino_i", "dinov2_i" or "judge_i": likeness to the references.

    Args: images: uint8 "B H W 3". references: uint8 "R H W 3", of a size of their own.
    Returns: the mean cosine over all pairs of a reference and a picture; of each
      picture, its mean over the references.
    Source: Ruiz et al. 2023, arXiv:2208.12242, CLIP-I and DINO; IMMA's eval/eval.py,
      https://github.com/amberyzheng/IMMA.
    """
    cosine_BR = backbone.images(images) @ backbone.images(references).T
    how = {"scale": "cosine, mean over all pairs", "references": len(references)}
    return _value("i", cosine_BR.mean(axis=1), "like the references", backbone, how)


def nearest(
    backbone: backbone.Backbone, images: np.ndarray, training: np.ndarray
) -> MetricResult:
    """Returns "clip_nearest", "dino_nearest" ...: how near a copy each picture is.

    Args: images: uint8 "B H W 3". training: uint8 "N H W 3", what was learned from.
    Returns: of each picture the cosine to the closest training picture, and their mean;
      `nearest_pictures` also says which that is.
    Source: Somepalli et al. 2023, arXiv:2212.03860, with other backbones.
    """
    cosine_B, _ = nearest_pictures(backbone, images, training)
    how = {"scale": "cosine to the closest", "training": len(training)}
    return _value("nearest", cosine_B, "like a training picture", backbone, how)


def nearest_pictures(
    backbone: backbone.Backbone, images: np.ndarray, training: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (cosine, float32 "B"; index, int "B") of the closest training pictures.

    Args: images: uint8 "B H W 3". training: uint8 "N H W 3".
    """
    cosine_BN = backbone.images(images) @ backbone.images(training).T
    return cosine_BN.max(axis=1), cosine_BN.argmax(axis=1)


def _value(suffix, samples, higher, backbone, how):
    name, value = f"{backbone.kind}_{suffix}", np.mean(samples, dtype=np.float64)
    return MetricResult(name, float(value), samples, higher, backbone.how | how)
