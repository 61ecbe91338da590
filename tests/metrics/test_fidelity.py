# SPDX-License-Identifier: Apache-2.0
"""Distances between images and their twins, drawn from the same noise."""

import numpy as np
import pytest

from gift_jax.metrics import backbone, fidelity, judge_lpips, lpips
from gift_jax.metrics.base import EvalSet
from gift_jax.metrics.settings import Settings
from gift_jax.metrics.suite import MetricSuite


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)


def measure(images, twins):
    eval_set = EvalSet(images, twin_images=twins)
    results = fidelity.measure(eval_set, None, backbone.load("judge"))
    return {result.name: result for result in results}


def test_twins_that_are_equal_are_at_no_distance(images):
    results = measure(images, images.copy())
    assert set(results) == {"twin_rms", "judge_twin_distance"}
    assert results["twin_rms"].value == 0
    assert results["judge_twin_distance"].value == pytest.approx(0, abs=1e-6)


def test_each_image_is_compared_with_its_own_twin(images):
    shifted = np.clip(images.astype(int) + 51, 0, 255).astype(np.uint8)
    results = measure(images, shifted)
    rms = np.sqrt(np.mean((images / 255.0 - shifted / 255.0) ** 2, axis=(1, 2, 3)))
    np.testing.assert_allclose(results["twin_rms"].samples, rms, rtol=1e-5)
    assert 0.1 < results["twin_rms"].value < 0.2
    # another order of the twins is another, larger distance
    far = measure(images, images[::-1])
    assert far["twin_rms"].value > 1.5 * results["twin_rms"].value
    middle = far["judge_twin_distance"].samples
    assert middle[2] == pytest.approx(0, abs=1e-6) and middle[0] > 1e-4


def test_large_sets_have_a_frechet_distance(images):
    many = np.tile(images, (20, 1, 1, 1))
    same = measure(many, many)["fd_judge_twin"].value
    other = measure(many, 255 - many)["fd_judge_twin"].value
    assert same == pytest.approx(0, abs=1e-3) and other > 1


def test_judge_lpips_compares_twins_too(images):
    eval_set = EvalSet(images, reference_images=images[:2], twin_images=images[::-1])
    results = {r.name: r for r in lpips.results(judge_lpips.load(), eval_set)}
    twin = results["judge_lpips_twin"].samples
    every = lpips.pairwise(judge_lpips.load(), images, images)
    np.testing.assert_allclose(twin, np.diagonal(every[:, ::-1]), atol=1e-5)
    assert twin[2] == pytest.approx(0, abs=1e-5) and twin[0] > 1e-3


def test_images_without_twins_are_skipped(images):
    suite = MetricSuite(Settings(names=("fidelity",)))
    assert suite.measure(EvalSet(images)) == []
    assert "no twin_images" in suite.skipped["fidelity"]
