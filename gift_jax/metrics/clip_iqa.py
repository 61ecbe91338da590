# SPDX-License-Identifier: Apache-2.0
"""Quality without a reference: CLIP-IQA."""

import numpy as np

from gift_jax.metrics.backbone import Backbone
from gift_jax.metrics.base import EvalSet, Metric, MetricResult, mean_result

PROMPTS = ("Good photo.", "Bad photo.")


def measure(eval_set: EvalSet, _, backbone: Backbone) -> list[MetricResult]:
    """Returns "clip_iqa": how much likelier an image is a good photo than a bad one.

    The softmax of 100 x the cosine to either prompt, in [0, 1].

    Source: Wang et al. 2023, arXiv:2207.12396, eq. 1, with the configured CLIP in place
      of its ResNet-50 without positions; torchmetrics CLIPImageQualityAssessment.
    """
    logits_B2 = 100.0 * backbone.images(eval_set.images) @ backbone.texts(PROMPTS).T
    samples = 1 / (1 + np.exp(logits_B2[:, 1] - logits_B2[:, 0], dtype=np.float64))
    provenance = backbone.provenance | {
        "scale": "softmax of 100 x cosine",
        "prompts": list(PROMPTS),
    }
    return [mean_result("clip_iqa", samples, "better quality", provenance)]


METRIC = Metric(
    "clip_iqa", "quality without a reference, in [0, 1]", measure, backbones=("clip",)
)
