# SPDX-License-Identifier: Apache-2.0
"""FID, KID, precision and recall against plain renderings and known answers."""

import numpy as np
import pytest
import scipy.linalg

from gift_jax.metrics import frechet
from gift_jax.runtime.errors import UserError

MADE = {"backbone": "inception-v3 pool3", "version": "abc", "resolution": 299}
OTHER = {"backbone": "dino_vits16"}


@pytest.fixture
def features(rng):
    """Two sets, float32 (60, 8) and (45, 8), that overlap in part."""
    mix = rng.normal(size=(8, 8))
    real = rng.normal(size=(60, 8)) @ mix
    generated = 0.7 * rng.normal(size=(45, 8)) @ mix + 0.8
    return real.astype(np.float32), generated.astype(np.float32)


# --- FID ------------------------------------------------------------------------------


def matrix_root_distance(real, generated):
    """As the paper writes it, with scipy's matrix root."""
    m1, m2 = real.mean(axis=0), generated.mean(axis=0)
    c1, c2 = (np.cov(x.astype(np.float64), rowvar=False) for x in (real, generated))
    root = scipy.linalg.sqrtm(c1 @ c2).real
    return np.sum((m1 - m2).astype(np.float64) ** 2) + np.trace(c1 + c2 - 2 * root)


def test_fid_equals_the_matrix_root(features):
    real, generated = features
    wanted = matrix_root_distance(real, generated)
    assert wanted > 1
    found = frechet.fid(real, generated, MADE)
    assert found.value == pytest.approx(wanted, rel=1e-6)
    assert found.name == "fid" and found.samples is None
    assert found.how == MADE | {"n_real": 60, "n_generated": 45, "features": 8}


def test_fid_of_two_gaussians_is_known(rng):
    """Of diagonal Gaussians: |m1 - m2|^2 + sum (s1 - s2)^2, reached by whitening."""

    def exact(mean, deviation):
        x = rng.normal(size=(100, 4))
        x = x - x.mean(axis=0)
        white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
        return white * deviation + mean

    one = exact(np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0, 2.0, 0.5, 3.0]))
    other = exact(np.array([1.0, 1.0, 0.0, 3.5]), np.array([2.0, 2.0, 1.0, 0.1]))
    wanted = (1 + 0 + 4 + 0.25) + (1 + 0 + 0.25 + 2.9**2)
    assert frechet.fid(one, other, MADE).value == pytest.approx(wanted, rel=1e-9)
    assert frechet.fid(one, one, MADE).value == pytest.approx(0, abs=1e-9)


def test_fid_of_few_pictures_cautions(rng, features):
    """With fewer pictures than features; sqrtm still agrees, to its own error."""
    real, generated = rng.normal(size=(7, 12)), rng.normal(1, 2, size=(9, 12))
    found = frechet.fid(real, generated, MADE)
    assert found.value == pytest.approx(matrix_root_distance(real, generated), rel=1e-4)
    assert "7 pictures for 12 features" in found.how["caution"]
    assert "caution" not in frechet.fid(*features, MADE).how


def test_other_backbones_do_not_take_the_names(features):
    assert frechet.fid(*features, OTHER).name == "fd"
    assert frechet.kid(*features, OTHER, subsets=1).name == "kd"


# --- KID ------------------------------------------------------------------------------


def squared_mmd(x, y):
    """The unbiased estimate, pair by pair."""

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


def test_kid_equals_the_sum_over_pairs(features):
    real, generated = (x.astype(np.float64) for x in features)
    rng, each = np.random.default_rng(3), []
    for _ in range(4):
        a = real[rng.choice(60, 20, replace=False)]
        b = generated[rng.choice(45, 20, replace=False)]
        each.append(squared_mmd(a, b))
    assert np.std(each) > 0.01 * np.mean(each) > 0
    found = frechet.kid(*features, MADE, subset=20, subsets=4, seed=3)
    assert found.value == pytest.approx(np.mean(each), rel=1e-9)
    assert found.how["std"] == pytest.approx(np.std(each), rel=1e-6)
    kept = {k: found.how[k] for k in ("subset", "subsets", "seed")}
    assert kept == {"subset": 20, "subsets": 4, "seed": 3}
    assert found.name == "kid" and "caution" not in found.how


def test_kid_of_two_gaussians_is_known(rng):
    """D = 1, where E (xy + 1)^3 = 1 + 3 a1 b1 + 3 a2 b2 + a3 b3 of the raw moments."""

    def kernel_mean(a, b):
        return 1 + 3 * a[0] * b[0] + 3 * a[1] * b[1] + a[2] * b[2]

    s = 0.5
    standard, shifted = (0, 1, 0), (s, 1 + s**2, s**3 + 3 * s)  # N(0, 1) and N(s, 1)
    wanted = kernel_mean(standard, standard) + kernel_mean(shifted, shifted)
    wanted -= 2 * kernel_mean(standard, shifted)
    real, generated = rng.normal(size=(6000, 1)), rng.normal(s, 1, size=(6000, 1))
    found = frechet.kid(real, generated, MADE, subset=200, subsets=60)
    error = 4 * found.how["std"] / 30**0.5  # 30 subsets of 200 hold every picture
    assert wanted > 2 * error
    assert found.value == pytest.approx(wanted, abs=error)


def test_kid_of_one_distribution_is_about_zero(rng):
    real, generated = rng.normal(size=(2, 200, 6))
    found = frechet.kid(real, generated, MADE, subset=100, subsets=20)
    assert abs(found.value) < 3 * found.how["std"]
    again = frechet.kid(real, generated, MADE, subset=100, subsets=20)
    other = frechet.kid(real, generated, MADE, subset=100, subsets=20, seed=1)
    assert found.value == again.value != other.value


def test_kid_of_few_pictures_cautions(features):
    found = frechet.kid(*features, MADE, subsets=2)
    assert found.how["subset"] == 45
    assert "subsets of 45" in found.how["caution"]


# --- precision and recall -------------------------------------------------------------


def which_inside(points, others, k):
    """Which of `points` lie within a ball about one of `others`, one by one."""
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


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_equal_the_loops(features, k, monkeypatch):
    real, generated = (x.astype(np.float64) for x in features)
    generated = generated * 1.3
    monkeypatch.setattr(frechet, "_ROWS", 7)
    precision, recall = frechet.precision_recall(real, generated, OTHER, nearest=k)
    wanted = which_inside(generated, real, k), which_inside(real, generated, k)
    assert 0 < wanted[0].mean() != wanted[1].mean() > 0
    np.testing.assert_array_equal(precision.samples, wanted[0])
    assert precision.value == wanted[0].mean() and recall.value == wanted[1].mean()
    assert precision.how == OTHER | {
        "n_real": 60,
        "n_generated": 45,
        "features": 8,
        "nearest": k,
    }


def test_precision_and_recall_have_their_directions(rng):
    real = rng.normal(size=(80, 4))
    narrow = 0.2 * rng.normal(size=(80, 4))  # good pictures, few kinds
    wide = 5 * rng.normal(size=(80, 4))
    of_narrow = [v.value for v in frechet.precision_recall(real, narrow, OTHER)]
    of_wide = [v.value for v in frechet.precision_recall(real, wide, OTHER)]
    assert of_narrow[0] > 0.95 and of_narrow[1] < 0.3
    assert of_wide[0] < 0.3 and of_wide[1] > 0.7
    same = [v.value for v in frechet.precision_recall(real, real, OTHER)]
    assert same == [1.0, 1.0]


# --- errors ---------------------------------------------------------------------------


def test_wrong_features_are_refused(features):
    real, generated = features
    with pytest.raises(UserError, match=r"shapes \[60, 8\] and \[45, 7\]"):
        frechet.fid(real, generated[:, :7], MADE)
    with pytest.raises(UserError, match="a set of 1 pictures; must have 2 or more"):
        frechet.kid(real, generated[:1], MADE)
    with pytest.raises(UserError, match="subset=1, subsets=100 must be at least 2"):
        frechet.kid(real, generated, MADE, subset=1)
    with pytest.raises(UserError, match="a set of 3 pictures; must have 4 or more"):
        frechet.precision_recall(real[:3], generated, MADE)
    with pytest.raises(UserError, match="nearest=0 must be at least 1"):
        frechet.precision_recall(real, generated, MADE, nearest=0)
    real = real.copy()
    real[4, 2] = np.nan
    with pytest.raises(UserError, match="features must be finite"):
        frechet.fid(real, generated, MADE)
