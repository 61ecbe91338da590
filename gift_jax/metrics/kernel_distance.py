# SPDX-License-Identifier: Apache-2.0
"""Two sets of images by a kernel: the squared MMD of a backbone's features.

With Inception it is called KID.
"""

import numpy as np

from gift_jax.metrics import features
from gift_jax.metrics.backbone import IMAGES, Backbone
from gift_jax.metrics.base import EvalSet, Metric, MetricResult

SUBSET, SUBSETS = 1000, 100  # images, draws: as the authors' code has them
SEED = 0  # of the draws


def kernel_distance(x_ND: np.ndarray, y_ND: np.ndarray) -> float:
    """Returns the unbiased squared MMD of two sets of N, kernel (x.y / D + 1)^3.

    Unbiased, and so may be below 0.

    Source: Binkowski et al. 2018, arXiv:1801.01401, eq. 4.
    """
    n, dim = x_ND.shape

    def kernel(a, b):
        return (a @ b.T / dim + 1.0) ** 3

    within = sum(
        k.sum() - np.trace(k) for k in (kernel(x_ND, x_ND), kernel(y_ND, y_ND))
    )
    return float(within / (n * (n - 1)) - 2 * kernel(x_ND, y_ND).mean())


def measure(eval_set: EvalSet, _, backbone: Backbone) -> list[MetricResult]:
    """Returns "kd_dinov2", "kd_clip" ...: the mean over random subsets.

    Raises: UserError if a set has fewer than two images.
    """
    real_RD, fake_ND, provenance = features.of_sets(backbone, eval_set)
    features.check_counts(real_RD, fake_ND, 2)
    subset = min(SUBSET, len(real_RD), len(fake_ND))
    rng, distances = np.random.default_rng(SEED), []
    for _ in range(SUBSETS):
        real = real_RD[rng.choice(len(real_RD), subset, replace=False)]
        fake = fake_ND[rng.choice(len(fake_ND), subset, replace=False)]
        distances.append(kernel_distance(real, fake))
    provenance |= {
        "kernel": "(x.y / D + 1)^3",
        "subset": subset,
        "subsets": SUBSETS,
        "seed": SEED,
        "std": round(float(np.std(distances)), 8),
    }
    if subset < SUBSET:
        provenance["caution"] = (
            f"subsets of {subset}, the smaller set whole, not {SUBSET}: they overlap, "
            "and the standard deviation over them is too small"
        )
    name, value = f"kd_{backbone.kind}", float(np.mean(distances))
    return [MetricResult(name, value, None, "less alike", provenance)]


METRIC = Metric(
    "kernel_distance",
    "squared MMD of two sets of features, cubic kernel",
    measure,
    needs=("reference_images",),
    fewest=2,
    backbones=IMAGES,
)
