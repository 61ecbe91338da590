# SPDX-License-Identifier: Apache-2.0
"""How well images fit their prompts: CLIP score."""

import numpy as np

from gift_jax.metrics.backbone import TEXTS, Backbone
from gift_jax.metrics.base import EvalSet, Metric, MetricResult, mean_result
from gift_jax.runtime.errors import UserError


def measure(eval_set: EvalSet, _, backbone: Backbone) -> list[MetricResult]:
    """Returns "clip_score" (or "judge_score"): 100 x the cosine of image and prompt.

    Mean over the images, nothing clipped: transformers' logits_per_image where CLIP's
    logit scale is 100, and what torchmetrics gives where that is not below 0, at which
    it clips the mean. A prompt too long for the model is cut off before its end token,
    which stays.

    Raises: UserError if there is not one prompt per image.
    Source: Hessel et al. 2021, arXiv:2104.08718, with 100 in place of 2.5; torchmetrics
      CLIPScore; UCE's eval-scripts/mean_clip.py,
      https://github.com/rohitgandikota/unified-concept-editing.
    """
    images, prompts = eval_set.images, eval_set.prompts
    if len(prompts) != len(images):
        raise UserError(
            f"{len(images)} images, but {len(prompts)} prompts; must be as many"
        )
    cosine_B = np.sum(backbone.images(images) * backbone.texts(prompts), axis=-1)
    provenance = backbone.provenance | {
        "scale": "100 x cosine, not clipped at 0",
        "logit_scale": round(backbone.logit_scale, 4),
    }
    name = f"{backbone.kind}_score"
    return [mean_result(name, 100.0 * cosine_B, "fits the prompt", provenance)]


METRIC = Metric(
    "clip_score",
    "how well an image fits its prompt: 100 x cosine",
    measure,
    needs=("prompts",),
    backbones=TEXTS,
)
