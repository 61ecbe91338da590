# SPDX-License-Identifier: Apache-2.0
"""How alike images are to reference images: CLIP-I, DINO."""

from gift_jax.metrics.backbone import IMAGES, Backbone
from gift_jax.metrics.base import EvalSet, Metric, MetricResult, mean_result


def measure(eval_set: EvalSet, _, backbone: Backbone) -> list[MetricResult]:
    """Returns "clip_image_similarity" (known as CLIP-I), "dino_image_similarity" ...

    The mean cosine over all pairs of a reference and an image; of each image, its mean
    over the references.

    Source: Ruiz et al. 2023, arXiv:2208.12242, CLIP-I and DINO; IMMA's eval/eval.py,
      https://github.com/amberyzheng/IMMA.
    """
    images, references = eval_set.images, eval_set.reference_images
    cosine_BR = backbone.images(images) @ backbone.images(references).T
    provenance = backbone.provenance | {
        "scale": "cosine, mean over all pairs",
        "references": len(references),
    }
    name, samples = f"{backbone.kind}_image_similarity", cosine_BR.mean(axis=1)
    return [mean_result(name, samples, "like the references", provenance)]


METRIC = Metric(
    "similarity",
    "mean cosine over all pairs of image and reference (CLIP-I, DINO)",
    measure,
    needs=("reference_images",),
    backbones=IMAGES,
)
