# SPDX-License-Identifier: Apache-2.0
"""NIQE on the caller's pictures against loops from the paper, and its directions."""

import math

import numpy as np
import pytest
from scipy import ndimage, optimize

from gift_jax.metrics import quality
from gift_jax.runtime.errors import UserError


def textured(rng, count, side=64):
    """Uint8 "count side side 3": boxes of many sizes over a slope, soft and grainy."""
    images = np.empty((count, side, side, 3))
    for image in images:
        image[:] = np.linspace(60, 180, side).reshape(side, 1, 1)
        for _ in range(side // 3):
            top, left = rng.integers(0, side, 2)
            height, width = rng.integers(2, side // 3, 2)
            colour = rng.integers(0, 256, 3)
            image[top : top + height, left : left + width] = colour
    images = ndimage.gaussian_filter(images, (0, 0.5, 0.5, 0))
    return as_pictures(images + rng.normal(0, 0.7, images.shape))


def as_pictures(images):
    return np.clip(np.rint(images), 0, 255).astype(np.uint8)


# --- features, from the paper ---------------------------------------------------------


def mscn(y_HW):
    """Equations 1 to 3, pixel by pixel."""
    height, width = y_HW.shape
    window = np.array(
        [
            [math.exp(-(i**2 + j**2) / (2 * (7 / 6) ** 2)) for j in range(-3, 4)]
            for i in range(-3, 4)
        ]
    )
    window /= window.sum()
    out, deviation = np.empty_like(y_HW), np.empty_like(y_HW)
    padded = np.pad(y_HW, 3, mode="edge")
    for i in range(height):
        for j in range(width):
            around = padded[i : i + 7, j : j + 7]
            mean = np.sum(window * around)
            deviation[i, j] = math.sqrt(np.sum(window * (around - mean) ** 2))
            out[i, j] = (y_HW[i, j] - mean) / (deviation[i, j] + 1)
    return out, deviation


def fit(values):
    """The moments' equations, solved by root finding instead of on a grid."""
    left = math.sqrt(np.mean([v**2 for v in values if v < 0]))
    right = math.sqrt(np.mean([v**2 for v in values if v > 0]))
    g = left / right
    r = np.mean(np.abs(values)) ** 2 / np.mean(np.square(values))
    r *= (g**3 + 1) * (g + 1) / (g**2 + 1) ** 2

    def miss(a):
        return math.gamma(2 / a) ** 2 / (math.gamma(1 / a) * math.gamma(3 / a)) - r

    alpha = optimize.brentq(miss, 0.15, 12)
    ratio = math.sqrt(math.gamma(1 / alpha) / math.gamma(3 / alpha))
    return alpha, left * ratio, right * ratio


def patch_statistics(patch):
    side = len(patch)
    alpha, left, right = fit(patch.ravel())
    found = [alpha, (left + right) / 2]
    for down, across in ((0, 1), (1, 0), (1, 1), (1, -1)):
        products = [
            patch[i, j] * patch[(i - down) % side, (j - across) % side]
            for i in range(side)
            for j in range(side)
        ]
        alpha, left, right = fit(products)
        mean = (right - left) * math.gamma(2 / alpha) / math.gamma(1 / alpha)
        found += [alpha, mean, left, right]
    return found


def halved(y_HW):
    """Bicubic (a = -1/2), the kernel twice as wide, weights normalised at the edges."""

    def cubic(x):
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    n = len(y_HW)
    matrix = np.array(
        [[cubic((j - (2 * i + 0.5)) / 2) for j in range(n)] for i in range(n // 2)]
    )
    matrix /= matrix.sum(axis=1, keepdims=True)
    return matrix @ y_HW @ matrix.T


def features_of(image, side):
    """(patches, 36) features and the patches' sharpness of one square picture."""
    red, green, blue = np.moveaxis(image.astype(int), 2, 0)
    y_HW = ((299 * red + 587 * green + 114 * blue + 500) // 1000).astype(float)
    (large, deviation), (small, _) = mscn(y_HW), mscn(halved(y_HW))
    found, sharp = [], []
    for top in range(0, len(image), side):
        for left in range(0, len(image), side):
            half = side // 2
            one = large[top : top + side, left : left + side]
            two = small[top // 2 :, left // 2 :][:half, :half]
            found.append(patch_statistics(one) + patch_statistics(two))
            sharp.append(deviation[top : top + side, left : left + side].mean())
    return np.array(found), np.array(sharp)


def test_features_equal_the_loops(rng):
    grain = ndimage.gaussian_filter(rng.standard_t(3, (2, 48, 48, 3)), (0, 1, 1, 0))
    images = as_pictures(120 + 40 * grain)
    found, sharp = quality.patch_features(images, 24)
    assert found.shape == (2, 4, 36)
    assert np.ptp(found, axis=(0, 1)).min() > 1e-3
    assert found[..., 0].max() < 9  # within the grid of alpha
    for i in range(2):
        wanted, wanted_sharp = features_of(images[i], 24)
        assert np.ptp(wanted[:, 0]) > 0.01
        # alpha is on a grid of 0.001, and the rest of an alpha follows it
        np.testing.assert_allclose(found[i], wanted, atol=6e-4, rtol=1e-3)
        np.testing.assert_allclose(sharp[i], wanted_sharp, rtol=1e-9)


def test_patches_do_not_depend_on_what_is_cut_off(rng):
    image = textured(rng, 1, 64)
    wide = np.concatenate([image, textured(rng, 1, 64)[:, :, :20]], axis=2)
    found, _ = quality.patch_features(wide, 32)
    np.testing.assert_array_equal(found, quality.patch_features(image, 32)[0])


@pytest.mark.parametrize("alpha", [0.7, 1.0, 2.0])
def test_fit_recovers_a_known_distribution(rng, alpha):
    """Drawn as beta Gamma(1 / alpha)^(1 / alpha), left and right of 0."""
    left, right = 0.5, 1.5
    size = rng.gamma(1 / alpha, size=200_000) ** (1 / alpha)
    is_left = rng.random(200_000) < left / (left + right)
    values = np.where(is_left, -left * size, right * size)
    found = [float(x[0]) for x in quality.asymmetric_fit(values[None])]
    np.testing.assert_allclose(found, [alpha, left, right], rtol=0.02)


def test_flat_patches_have_the_limit_of_the_fit():
    alpha, left, right = quality.asymmetric_fit(np.zeros((1, 50)))
    assert (alpha[0], left[0], right[0]) == (0.2, 0, 0)
    white = np.full((1, 64, 64, 3), 255, np.uint8)
    found, sharp = quality.patch_features(white, 32)
    np.testing.assert_array_equal(sharp, 0)
    np.testing.assert_array_equal(np.unique(found), [0, 0.2])


# --- scores ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def natural():
    return quality.fit(textured(np.random.default_rng(5), 20))


def test_fit_and_score_equal_the_paper(rng, monkeypatch):
    """Of the same features: sharp patches, two covariances, one distance."""
    monkeypatch.setattr(quality, "BATCH", 3)
    training, images = textured(rng, 8), textured(rng, 4)
    natural = quality.fit(training)
    assert natural.patch == 32
    kept = []
    for image in training:
        features, sharp = (x[0] for x in quality.patch_features(image[None], 32))
        kept += [
            f for f, s in zip(features, sharp, strict=True) if s > 0.75 * max(sharp)
        ]
    assert 8 < len(kept) < 32
    mean = sum(kept) / len(kept)
    shrink = 36 / (36 + len(kept))
    cov = sum(np.outer(f - mean, f - mean) for f in kept) / (len(kept) - 1)
    cov = np.where(np.eye(36) == 1, cov + 1e-6, (1 - shrink) * cov)
    found = quality.niqe(natural, images)
    for image, sample in zip(images, found.samples, strict=True):
        features = quality.patch_features(image[None], 32)[0][0]
        gap = features.mean(axis=0) - mean
        both = (cov + np.cov(features.T)) / 2
        wanted = math.sqrt(gap @ np.linalg.pinv(both) @ gap)
        assert wanted > 0.5
        assert sample == pytest.approx(wanted, rel=1e-5)
    assert found.value == pytest.approx(found.samples.mean())
    assert found.how["training_patches"] == len(kept)
    assert found.how["patch"] == 32 and found.how["size"] == "64x64"


def test_blur_noise_and_flatness_score_worse(natural, rng):
    images = textured(rng, 8)
    clean = quality.niqe(natural, images)
    assert clean.value == pytest.approx(natural.how["training_score"], rel=0.35)
    blurred = [ndimage.gaussian_filter(images * 1.0, (0, s, s, 0)) for s in (0.7, 1.5)]
    noisy = [images + rng.normal(0, s, images.shape) for s in (10, 30)]
    for mild, strong in (blurred, noisy):
        assert np.abs(mild - images).max() > 5
        first = quality.niqe(natural, as_pictures(mild)).samples
        second = quality.niqe(natural, as_pictures(strong)).samples
        assert np.all(first > clean.samples) and second.mean() > first.mean()
    flat = quality.niqe(natural, np.full_like(images, 90))
    assert np.isfinite(flat.value) and flat.value > clean.samples.max()


def test_patch_follows_the_pictures(rng):
    assert quality.fit(textured(rng, 1, 200)).patch == 96
    assert quality.fit(textured(rng, 2, 36)).patch == 18


def test_sharpness_is_the_laplacians_variance(rng):
    images = textured(rng, 3)
    soft = as_pictures(ndimage.gaussian_filter(images * 1.0, (0, 1, 1, 0)))
    found = quality.sharpness(images)
    y_BHW = np.pad(quality.luminance(images), ((0, 0), (1, 1), (1, 1)), mode="reflect")
    wanted = np.zeros((3, 64, 64))
    for i, j in np.ndindex(64, 64):
        near = y_BHW[:, i : i + 3, j : j + 3]
        wanted[:, i, j] = near[:, 0, 1] + near[:, 2, 1] + near[:, 1, 0] + near[:, 1, 2]
        wanted[:, i, j] -= 4 * near[:, 1, 1]
    np.testing.assert_allclose(found.samples, wanted.var(axis=(1, 2)), rtol=1e-6)
    assert np.all(quality.sharpness(soft).samples < found.samples)
    assert found.value == pytest.approx(found.samples.mean())


def test_sharpness_equals_opencv(rng):
    cv2 = pytest.importorskip("cv2")
    images = textured(rng, 3)
    wanted = [
        cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var()
        for image in images
    ]
    assert np.ptp(wanted) > 1
    np.testing.assert_allclose(quality.sharpness(images).samples, wanted, rtol=1e-3)


# --- errors ---------------------------------------------------------------------------


def test_unfit_pictures_are_refused(natural, rng):
    with pytest.raises(UserError, match="pictures of 24 pixels are too small"):
        quality.fit(textured(rng, 2, 24))
    with pytest.raises(UserError, match="2 training pictures have 0 textured patches"):
        quality.fit(np.full((2, 64, 64, 3), 7, np.uint8))
    with pytest.raises(
        UserError, match="32x32 pixels hold fewer than two patches of 32"
    ):
        quality.niqe(natural, textured(rng, 1, 32))
