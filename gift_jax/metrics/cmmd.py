# SPDX-License-Identifier: Apache-2.0
"""Two sets of images by CLIP and a Gaussian kernel: CMMD.

Unlike a Frechet distance it assumes no Gaussian features and is steady on few images.
"""

import numpy as np

from gift_jax.metrics import features
from gift_jax.metrics.backbone import Backbone, unit
from gift_jax.metrics.base import EvalSet, Metric, MetricResult

SIGMA, SCALE = 10.0, 1000.0
PUBLISHED = 336, 768  # pixels and features of openai/clip-vit-large-patch14-336
_ROWS = 1024  # of a distance matrix at a time


def cmmd(real_RD: np.ndarray, fake_ND: np.ndarray) -> float:
    """Returns 1000 x the squared MMD of two sets of unit vectors, in float64.

    Kernel exp(-|x - y|^2 / (2 sigma^2)), sigma 10; the minimum-variance estimate: means
    over all pairs, an image with itself included.

    Source: Jayasumana et al. 2024, arXiv:2401.09603, eqs. 5 and 6; its published code.
    """

    def mean_kernel(x_ND, y_MD):
        total = 0.0
        for first in range(0, len(x_ND), _ROWS):
            rows = x_ND[first : first + _ROWS]
            squares = np.sum(rows**2, axis=1)[:, None] + np.sum(y_MD**2, axis=1)[None]
            distance = squares - 2 * rows @ y_MD.T
            total += np.exp(-distance / (2 * SIGMA**2)).sum()
        return total / (len(x_ND) * len(y_MD))

    within = mean_kernel(real_RD, real_RD) + mean_kernel(fake_ND, fake_ND)
    return float(SCALE * (within - 2 * mean_kernel(real_RD, fake_ND)))


def measure(eval_set: EvalSet, _, backbone: Backbone) -> list[MetricResult]:
    """Returns "cmmd"."""
    real_RD, fake_ND, provenance = features.of_sets(backbone, eval_set)
    value = cmmd(unit(real_RD), unit(fake_ND))
    provenance |= {"kernel": "Gaussian", "sigma": SIGMA, "scale": SCALE}
    if (backbone.resolution, real_RD.shape[1]) != PUBLISHED:
        provenance["caution"] = (
            "published numbers are of openai/clip-vit-large-patch14-336"
        )
    return [MetricResult("cmmd", value, None, "less alike", provenance)]


METRIC = Metric(
    "cmmd",
    "MMD of two sets of CLIP embeddings, Gaussian kernel, x 1000",
    measure,
    needs=("reference_images",),
    fewest=2,
    backbones=("clip",),
)
