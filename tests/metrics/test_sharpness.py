# SPDX-License-Identifier: Apache-2.0
"""Sharpness against the definition, and OpenCV if it is here."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from gift_jax.metrics.base import EvalSet
from gift_jax.metrics.sharpness import METRIC


def sharpness(images):
    (result,) = METRIC.measure(EvalSet(images), None, None)
    return result


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)


def test_sharpness_is_the_laplacians_variance(images):
    luma = np.array([0.299, 0.587, 0.114])
    y_BHW = np.floor(images @ luma + 0.5 + 1e-9)
    y_BHW = np.pad(y_BHW, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    expected = np.zeros((3, 20, 24))
    for i, j in np.ndindex(20, 24):
        near = y_BHW[:, i : i + 3, j : j + 3].reshape(3, 9)
        expected[:, i, j] = near[:, [1, 3, 5, 7]].sum(axis=1) - 4 * near[:, 4]
    result = sharpness(images)
    np.testing.assert_allclose(result.samples, expected.var(axis=(1, 2)), rtol=1e-6)
    assert result.value == pytest.approx(result.samples.mean())
    blur = ImageFilter.GaussianBlur(1)
    soft = [np.asarray(Image.fromarray(image).filter(blur)) for image in images]
    assert np.all(sharpness(np.stack(soft)).samples < result.samples)


def test_sharpness_equals_opencv(images):
    cv2 = pytest.importorskip("cv2")
    expected = [
        cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var()
        for image in images
    ]
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(sharpness(images).samples, expected, rtol=1e-3)
