# SPDX-License-Identifier: Apache-2.0
"""Distances of distributions against independent renderings and known answers."""

import numpy as np
import pytest
import scipy.linalg
from fake_backbones import fixed, numbered

from gift_jax.metrics import cmmd, kernel_distance, precision_recall
from gift_jax.metrics.base import EvalSet
from gift_jax.metrics.base import load as load_metric
from gift_jax.metrics.frechet_distance import frechet_distance
from gift_jax.runtime.errors import UserError


@pytest.fixture
def features(rng):
    """Two sets, float32 (60, 8) and (45, 8), that overlap in part."""
    mix = rng.normal(size=(8, 8))
    real = rng.normal(size=(60, 8)) @ mix
    generated = 0.7 * rng.normal(size=(45, 8)) @ mix + 0.8
    return real.astype(np.float32), generated.astype(np.float32)


def measure(name, real, generated, kind="dinov2", **backbone):
    """The results of a metric of images with these features."""
    model = fixed(kind, np.concatenate([real, generated]), **backbone)
    count = len(real) + len(generated)
    eval_set = EvalSet(
        numbered(*range(len(real), count)), reference_images=numbered(*range(len(real)))
    )
    return list(load_metric(name).measure(eval_set, None, model))


# --- Frechet distance -----------------------------------------------------------------


def matrix_root_distance(real, generated):
    """As the paper writes it, with scipy's matrix root."""
    m1, m2 = real.mean(axis=0), generated.mean(axis=0)
    c1, c2 = (np.cov(x.astype(np.float64), rowvar=False) for x in (real, generated))
    root = scipy.linalg.sqrtm(c1 @ c2).real
    return np.sum((m1 - m2).astype(np.float64) ** 2) + np.trace(c1 + c2 - 2 * root)


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_fd_equals_the_matrix_root_of_features_as_they_are(features, kind):
    real, generated = features
    expected = matrix_root_distance(real, generated)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in features]
    assert expected > 1 > 2 * matrix_root_distance(*unit)
    (result,) = measure("frechet_distance", real, generated, kind)
    assert result.value == pytest.approx(expected, rel=1e-5)
    assert result.name == f"fd_{kind}" and result.samples is None
    counts = {"n_real": 60, "n_generated": 45, "features": 8}
    assert counts.items() <= result.provenance.items()
    assert "caution" not in result.provenance


def test_fd_of_two_gaussians_is_known(rng):
    """Of diagonal Gaussians: |m1 - m2|^2 + sum (s1 - s2)^2, reached by whitening."""

    def exact(mean, deviation):
        x = rng.normal(size=(100, 4))
        x = x - x.mean(axis=0)
        white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
        return white * deviation + mean

    a = exact(np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 2.0, 0.5, 3.0]))
    b = exact(np.array([1.0, 1.0, 0.0, 3.5]), np.array([2.0, 2.0, 1.0, 0.1]))
    expected = (1 + 0 + 4 + 0.25) + (1 + 0 + 0.25 + 2.9**2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_fd_of_few_images_cautions(rng):
    """With fewer images than features; sqrtm still agrees, to its own error."""
    real, generated = rng.normal(size=(7, 12)), rng.normal(1, 2, size=(9, 12))
    (result,) = measure("frechet_distance", real, generated)
    expected = matrix_root_distance(real, generated)
    assert result.value == pytest.approx(expected, rel=1e-4)
    assert "7 images for 12 features" in result.provenance["caution"]


# --- kernel distance ------------------------------------------------------------------


def pair_by_pair(x, y):
    """The unbiased estimate of the cubic kernel's squared MMD."""

    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    total = sum(
        kernel(x[i], x[j]) / (n * (n - 1)) for i in range(n) for j in range(n) if i != j
    )
    total += sum(
        kernel(y[i], y[j]) / (m * (m - 1)) for i in range(m) for j in range(m) if i != j
    )
    return total - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_kd_equals_the_sum_over_pairs(features, monkeypatch):
    for name, value in (("SUBSET", 20), ("SUBSETS", 4), ("SEED", 3)):
        monkeypatch.setattr(kernel_distance, name, value)
    real, generated = (x.astype(np.float64) for x in features)
    rng, each = np.random.default_rng(3), []
    for _ in range(4):
        a = real[rng.choice(60, 20, replace=False)]
        b = generated[rng.choice(45, 20, replace=False)]
        each.append(pair_by_pair(a, b))
    assert np.std(each) > 0.01 * np.mean(each) > 0
    (result,) = measure("kernel_distance", *features)
    assert result.value == pytest.approx(np.mean(each), rel=1e-6)
    assert result.provenance["std"] == pytest.approx(np.std(each), rel=1e-5)
    assert result.name == "kd_dinov2" and "caution" not in result.provenance


def test_kd_of_two_gaussians_is_known(rng):
    """D = 1, where E (xy + 1)^3 = 1 + 3 a1 b1 + 3 a2 b2 + a3 b3 of the raw moments."""

    def kernel_mean(a, b):
        return 1 + 3 * a[0] * b[0] + 3 * a[1] * b[1] + a[2] * b[2]

    s = 0.5
    standard, shifted = (0, 1, 0), (s, 1 + s**2, s**3 + 3 * s)  # N(0, 1) and N(s, 1)
    expected = kernel_mean(standard, standard) + kernel_mean(shifted, shifted)
    expected -= 2 * kernel_mean(standard, shifted)
    real, generated = rng.normal(size=(30, 200, 1)), rng.normal(s, 1, size=(30, 200, 1))
    both = zip(real, generated, strict=True)
    values = [kernel_distance.kernel_distance(x, y) for x, y in both]
    error = 4 * np.std(values) / 30**0.5
    assert expected > 2 * error
    assert np.mean(values) == pytest.approx(expected, abs=error)


def test_kd_of_few_images_cautions(features):
    (result,) = measure("kernel_distance", *features)
    assert result.provenance["subset"] == 45
    assert "subsets of 45" in result.provenance["caution"]


# --- CMMD -----------------------------------------------------------------------------


def test_cmmd_equals_pytorch_over_all_pairs(features, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(cmmd, "_ROWS", 7)
    x, y = (torch.tensor(a, dtype=torch.float64) for a in features)
    x, y = (a / a.norm(dim=1, keepdim=True) for a in (x, y))

    def kernel(a, b):
        return torch.exp(-(torch.cdist(a, b) ** 2) / (2 * 10.0**2)).mean()

    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)).item()
    (result,) = measure("cmmd", *features, kind="clip")
    assert expected > 0.1
    assert result.value == pytest.approx(expected, rel=1e-4)
    assert "vit-large-patch14-336" in result.provenance["caution"]
    (same,) = measure("cmmd", features[0], features[0], kind="clip")
    assert same.value == pytest.approx(0, abs=1e-9)


def test_cmmd_of_the_published_backbone_has_no_caution(rng):
    features = rng.normal(size=(2, 3, 768))
    (result,) = measure("cmmd", *features, kind="clip", resolution=336)
    assert "caution" not in result.provenance
    assert load_metric("cmmd").backbones == ("clip",)


# --- precision and recall -------------------------------------------------------------


def inside_one_by_one(points, others, k):
    """Which of `points` lie within a ball about one of `others`."""
    radii = [
        sorted(np.linalg.norm(o - q) for j, q in enumerate(others) if j != i)[k - 1]
        for i, o in enumerate(others)
    ]
    return np.array(
        [
            any(np.linalg.norm(p - o) <= r for o, r in zip(others, radii, strict=True))
            for p in points
        ]
    )


def test_precision_recall_equal_the_loops(features, monkeypatch):
    real, generated = (x.astype(np.float64) for x in features)
    generated = generated * 1.3
    monkeypatch.setattr(precision_recall, "_ROWS", 7)
    precision, recall = measure("precision_recall", real, generated)
    expected = (
        inside_one_by_one(generated, real, 3),
        inside_one_by_one(real, generated, 3),
    )
    assert 0 < expected[0].mean() != expected[1].mean() > 0
    np.testing.assert_array_equal(precision.samples, expected[0])
    assert precision.value == expected[0].mean()
    assert recall.value == expected[1].mean()
    assert (precision.name, recall.name) == ("precision_dinov2", "recall_dinov2")
    assert precision.provenance["nearest"] == 3


def test_precision_and_recall_have_their_directions(rng):
    real = rng.normal(size=(80, 4))
    narrow = 0.2 * rng.normal(size=(80, 4))  # good images, few kinds
    wide = 5 * rng.normal(size=(80, 4))
    of_narrow = [v.value for v in measure("precision_recall", real, narrow)]
    of_wide = [v.value for v in measure("precision_recall", real, wide)]
    assert of_narrow[0] > 0.95 and of_narrow[1] < 0.3
    assert of_wide[0] < 0.3 and of_wide[1] > 0.7


# --- errors ---------------------------------------------------------------------------


def test_too_few_images_and_broken_features_are_refused(features):
    real, generated = features
    for name, low in (
        ("frechet_distance", 2),
        ("kernel_distance", 2),
        ("precision_recall", 4),
    ):
        message = f"a set of {low - 1} images; must have {low} or more"
        with pytest.raises(UserError, match=message):
            measure(name, real, generated[: low - 1])
    real = real.copy()
    real[4, 2] = np.nan
    with pytest.raises(UserError, match="features must be finite"):
        measure("frechet_distance", real, generated)
