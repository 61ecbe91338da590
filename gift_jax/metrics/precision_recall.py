# SPDX-License-Identifier: Apache-2.0
"""Two sets of images by the regions that they cover: precision and recall."""

import numpy as np

from gift_jax.metrics import features
from gift_jax.metrics.backbone import IMAGES, Backbone
from gift_jax.metrics.base import EvalSet, Metric, MetricResult, mean_result

NEAREST = 3  # the paper's k
_ROWS = 1024  # of a distance matrix at a time


def inside_region(x_ND: np.ndarray, y_MD: np.ndarray, k: int = NEAREST) -> np.ndarray:
    """Returns bool "N": which of x lie in the region of y.

    The region is the union of balls about the rows of y, each as large as reaches the
    k-th nearest other one.

    Source: Kynkaanniemi et al. 2019, arXiv:1904.06991, eq. 1.
    """
    radii_M = np.concatenate(
        [
            # the row itself is the nearest of all, at distance 0
            np.partition(_squared_distances(rows, y_MD), k, axis=1)[:, k]
            for rows in _blocks(y_MD)
        ]
    )
    return np.concatenate(
        [
            np.any(_squared_distances(rows, y_MD) <= radii_M[None], axis=1)
            for rows in _blocks(x_ND)
        ]
    )


def _blocks(x_ND):
    return [x_ND[first : first + _ROWS] for first in range(0, len(x_ND), _ROWS)]


def _squared_distances(x_ND, y_MD):
    squares = np.sum(x_ND**2, axis=1)[:, None] + np.sum(y_MD**2, axis=1)[None]
    return np.maximum(squares - 2 * x_ND @ y_MD.T, 0.0)


def measure(eval_set: EvalSet, _, backbone: Backbone) -> list[MetricResult]:
    """Returns "precision_dinov2" and "recall_dinov2", and so for other backbones.

    Precision is the share of generated images in the real ones' region (samples: 1 or
    0 of each); recall the share of real images in the generated ones'.

    Raises: UserError if a set has not more than `NEAREST` images.
    Source: Kynkaanniemi et al. 2019, arXiv:1904.06991, eq. 2.
    """
    real_RD, fake_ND, provenance = features.of_sets(backbone, eval_set)
    features.check_counts(real_RD, fake_ND, NEAREST + 1)
    provenance["nearest"] = NEAREST
    precision = mean_result(
        f"precision_{backbone.kind}",
        inside_region(fake_ND, real_RD),
        "more generated images look real",
        provenance,
    )
    recall = MetricResult(
        f"recall_{backbone.kind}",
        float(np.mean(inside_region(real_RD, fake_ND))),
        None,
        "more real images can be generated",
        provenance,
    )
    return [precision, recall]


METRIC = Metric(
    "precision_recall",
    "share of images inside the real ones' region, and the reverse",
    measure,
    needs=("reference_images",),
    fewest=NEAREST + 1,
    backbones=IMAGES,
)
