# SPDX-License-Identifier: Apache-2.0
"""Two sets of images as two Gaussians: the Frechet distance of a backbone's features.

With Inception it is called FID; of DINOv2's ViT-L/14 (facebook/dinov2-large) it is the
FD-DINOv2 of Stein et al. 2023, arXiv:2306.04675, who find it nearer to what people see.
"""

import numpy as np

from gift_jax.metrics import features
from gift_jax.metrics.backbone import IMAGES, Backbone
from gift_jax.metrics.base import EvalSet, Metric, MetricResult


def frechet_distance(real_RD: np.ndarray, fake_ND: np.ndarray) -> float:
    """Returns the Frechet distance of the Gaussians that fit two sets of features.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), in float64. The root's trace is the sum
    of the singular values of X1 X2' / sqrt((R-1)(N-1)), where X are the centered
    features (of which QR keeps D rows): no root of a singular matrix is taken.

    Raises: UserError if a set has fewer than two images.
    Source: Heusel et al. 2017, arXiv:1706.08500, section 3; covariances over N - 1, as
      pytorch-fid and dgm-eval have them.
    """
    features.check_counts(real_RD, fake_ND, 2)
    gap_D = real_RD.mean(axis=0) - fake_ND.mean(axis=0)
    a, b = (
        np.linalg.qr(x - x.mean(axis=0, keepdims=True), mode="r") / np.sqrt(len(x) - 1)
        for x in (real_RD, fake_ND)
    )
    shared = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    distance = gap_D @ gap_D + np.sum(a**2) + np.sum(b**2) - 2 * shared
    return max(float(distance), 0.0)


def measure(eval_set: EvalSet, _, backbone: Backbone) -> list[MetricResult]:
    """Returns "fd_dinov2", "fd_clip" ..."""
    real_RD, fake_ND, provenance = features.of_sets(backbone, eval_set)
    value = frechet_distance(real_RD, fake_ND)
    fewest, width = min(len(real_RD), len(fake_ND)), real_RD.shape[1]
    if fewest <= width:
        provenance["caution"] = (
            f"{fewest} images for {width} features: the covariance is singular and the "
            "distance biased upwards; compare equal counts only"
        )
    name = f"fd_{backbone.kind}"
    return [MetricResult(name, value, None, "less alike", provenance)]


METRIC = Metric(
    "frechet_distance",
    "Frechet distance of two sets of features (FD-DINOv2)",
    measure,
    needs=("reference_images",),
    fewest=2,
    backbones=IMAGES,
)
