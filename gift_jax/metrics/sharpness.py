# SPDX-License-Identifier: Apache-2.0
"""How sharp images are, without a network."""

import numpy as np

from gift_jax.metrics.base import EvalSet, Metric, MetricResult, mean_result

_LUMA = np.array([299.0, 587.0, 114.0])  # ITU-R BT.601, in thousandths


def measure(eval_set: EvalSet, *_) -> list[MetricResult]:
    """Returns "sharpness": the variance of the Laplacian of the luminance, in 0..255.

    Source: Pech-Pacheco et al. 2000 (doi 10.1109/ICPR.2000.903548); the numbers of
      OpenCV's Laplacian(gray, CV_64F).var(), edges mirrored, up to its rounding.
    """
    images = eval_set.images
    y_BHW = np.floor((images.astype(np.float64) @ _LUMA + 500) / 1000)  # exact
    y_BHW = np.pad(y_BHW, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    around = y_BHW[:, :-2, 1:-1] + y_BHW[:, 2:, 1:-1]
    around += y_BHW[:, 1:-1, :-2] + y_BHW[:, 1:-1, 2:]
    samples = np.var(around - 4 * y_BHW[:, 1:-1, 1:-1], axis=(1, 2))
    provenance = {
        "method": "variance of the Laplacian, 4 neighbors, luminance 0..255",
        "size": f"{images.shape[1]}x{images.shape[2]}",
    }
    return [mean_result("sharpness", samples, "sharper", provenance)]


METRIC = Metric("sharpness", "variance of the Laplacian", measure)
