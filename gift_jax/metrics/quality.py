# SPDX-License-Identifier: Apache-2.0
"""Picture quality without a network: NIQE fitted on the training pictures, sharpness.

Natural pictures, made free of local brightness and contrast, have coefficients of one
characteristic shape. Blur, noise and the artefacts of a broken model change it. Here
"natural" is what the caller's own training pictures are, so no weights are needed.
"""

import dataclasses
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage, special

from gift_jax.metrics.base import MetricResult
from gift_jax.runtime.errors import UserError

FEATURES = 36  # 18 at each of two scales
LARGEST_PATCH = 96  # pixels, the paper's
SHARP = 0.75  # of the sharpest patch of a picture, the paper's
BATCH = 16  # pictures, that of memory alone
_REACH, _SPREAD = 3, 7 / 6  # of the local window: 7 x 7 pixels, Gaussian
_STEP = 0.001  # of alpha's grid, and so the least deviation of any feature
_ALPHA = np.arange(0.2, 10 + _STEP / 2, _STEP)
_RHO = special.gamma(2 / _ALPHA) ** 2 / (
    special.gamma(1 / _ALPHA) * special.gamma(3 / _ALPHA)
)
_SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))


@dataclasses.dataclass(frozen=True, eq=False)
class Natural:
    """The Gaussian that the patches of the reference pictures form.

    Attributes: mean_F, cov_FF: float64, F = `FEATURES`; the covariance as it is used,
      shrunk. patch: side in pixels. how: what it was fitted on, for a Value.
    """

    mean_F: np.ndarray
    cov_FF: np.ndarray
    patch: int
    how: dict[str, Any]


# --- features -------------------------------------------------------------------------


def luminance(images: np.ndarray) -> np.ndarray:
    """Returns whole numbers 0..255, float64 "B H W", of uint8 "B H W 3" pictures.

    Source: ITU-R BT.601, rounded half up, as MATLAB's rgb2gray. OpenCV's cvtColor has
      fixed point, and one level more or less in a thousandth of the pixels.
    """
    thousandths = images.astype(np.float64) @ np.array([299.0, 587.0, 114.0])
    return np.floor((thousandths + 500) / 1000)  # exact: ties are not rare


def normalised(y_BHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (MSCN coefficients, local deviations), float64 "B H W" each.

    Edges are repeated. Where the surroundings are flat, both are exactly 0 and not what
    rounding leaves, the signs of which the fits would count.

    Args: y_BHW: float64, luminance in 0..255.
    Source: Mittal et al. 2013 (doi 10.1109/LSP.2012.2227726), eqs. 1 to 3, C = 1.
    """
    taps = np.exp(-(np.arange(-_REACH, _REACH + 1) ** 2) / (2 * _SPREAD**2))
    taps /= taps.sum()

    def local_mean(x_BHW):
        rows = ndimage.correlate1d(x_BHW, taps, axis=1, mode="nearest")
        return ndimage.correlate1d(rows, taps, axis=2, mode="nearest")

    mean = local_mean(y_BHW)
    variance = np.abs(local_mean(y_BHW**2) - mean**2)
    flat = variance < 1e-6  # one grey level in a corner of the window makes 2e-4
    deviation = np.where(flat, 0.0, np.sqrt(variance))
    return np.where(flat, 0.0, (y_BHW - mean) / (deviation + 1)), deviation


def asymmetric_fit(v_Pn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (alpha, left beta, right beta), float64 "P" each, of "P n" values.

    Moment matching of an asymmetric generalised Gaussian, alpha on a grid from 0.2 to
    10. All zeros give (0.2, 0, 0), the limit of ever rarer values.

    Source: Lasmar et al. 2009, as in Mittal et al. 2013, eqs. 6 to 9, and the authors'
      niqe_release/estimateaggdparam.m.
    """

    def one_sided(where_Pn):
        count = np.maximum(where_Pn.sum(axis=1), 1)
        return np.sqrt(np.where(where_Pn, v_Pn**2, 0.0).sum(axis=1) / count)

    left, right = one_sided(v_Pn < 0), one_sided(v_Pn > 0)
    both, square = left**2 + right**2, np.mean(v_Pn**2, axis=1)
    some = both > 0
    rho = np.mean(np.abs(v_Pn), axis=1) ** 2 / np.where(some, square, 1.0)
    rho *= (left**3 + right**3) * (left + right) / np.where(some, both, 1.0) ** 2
    middles = (_RHO[1:] + _RHO[:-1]) / 2  # the grid's nearest; _RHO rises
    alpha = _ALPHA[np.searchsorted(middles, rho)]
    scale = np.sqrt(special.gamma(1 / alpha) / special.gamma(3 / alpha))
    return alpha, left * scale, right * scale


def patch_features(images: np.ndarray, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (features "B P 36", sharpness "B P"), float64, of P patches a picture.

    The patches do not overlap; what is left over at the right and bottom is cut off.
    The second scale is the picture at half the size (bicubic, antialiased).

    Args: images: uint8 "B H W 3". patch: side in pixels, even.
    Source: niqe_release/computefeature.m and computequality.m. The products with a
      neighbour wrap round within a patch, as there.
    """
    _, height, width, _ = images.shape
    y_BHW = luminance(images[:, : height // patch * patch, : width // patch * patch])
    coefficients, deviation = normalised(y_BHW)
    small, _ = normalised(_halved(y_BHW))
    parts = [
        _statistics(_patches(coefficients, patch)),
        _statistics(_patches(small, patch // 2)),
    ]
    sharp_BP = np.mean(_patches(deviation, patch), axis=(2, 3))
    return np.concatenate(parts, axis=2), sharp_BP


def _halved(y_BHW):
    size = y_BHW.shape[2] // 2, y_BHW.shape[1] // 2
    pictures = [Image.fromarray(y_HW.astype(np.float32)) for y_HW in y_BHW]
    small = [np.asarray(p.resize(size, Image.Resampling.BICUBIC)) for p in pictures]
    return np.stack(small).astype(np.float64)


def _patches(x_BHW, side):
    """Returns "B P side side"."""
    B, H, W = x_BHW.shape
    x = x_BHW.reshape(B, H // side, side, W // side, side)
    return np.transpose(x, (0, 1, 3, 2, 4)).reshape(B, -1, side, side)


def _statistics(m_BPss):
    """Returns the 18 features of each patch of MSCN coefficients, "B P 18"."""
    B, P, side, _ = m_BPss.shape
    alpha, left, right = asymmetric_fit(m_BPss.reshape(B * P, side * side))
    found = [alpha, (left + right) / 2]
    for shift in _SHIFTS:
        product = m_BPss * np.roll(m_BPss, shift, axis=(2, 3))
        alpha, left, right = asymmetric_fit(product.reshape(B * P, side * side))
        mean = (right - left) * special.gamma(2 / alpha) / special.gamma(1 / alpha)
        found += [alpha, mean, left, right]
    return np.stack(found, axis=1).reshape(B, P, -1)


# --- scores ---------------------------------------------------------------------------


def fit(images: np.ndarray) -> Natural:
    """Returns the Gaussian of the training pictures' sharp patches.

    Patches are of 96 pixels as in the paper, or half the shorter side if that is less:
    32 for pictures of 64. Few pictures give fewer patches than the covariance has rows,
    so it is shrunk towards its diagonal by F / (F + patches): nothing for thousands.

    Args: images: uint8 "N H W 3", N >= 1.
    Raises: UserError if they are too small, or have fewer than two textured patches.
    Source: Mittal et al. 2013, section II-C; the shrinking is ours.
    """
    shorter = min(images.shape[1:3])
    patch = min(LARGEST_PATCH, shorter // 4 * 2)
    if patch < 16:
        raise UserError(
            f"pictures of {shorter} pixels are too small; must be 32 or more"
        )
    features_NPF, sharp_NP = _features(images, patch)
    kept_KF = features_NPF[sharp_NP > SHARP * sharp_NP.max(axis=1, keepdims=True)]
    if len(kept_KF) < 2:
        raise UserError(
            f"{len(images)} training pictures have {len(kept_KF)} textured patches; "
            "must have at least two: give more pictures"
        )
    shrink = FEATURES / (FEATURES + len(kept_KF))
    cov_FF = np.cov(kept_KF, rowvar=False)
    cov_FF = (1 - shrink) * cov_FF + shrink * np.diag(np.diag(cov_FF))
    cov_FF += _STEP**2 * np.eye(FEATURES)
    mean_F = np.mean(kept_KF, axis=0)
    how = {
        "training_pictures": len(images),
        "training_patches": len(kept_KF),
        "training_size": _size(images),
        "training_score": round(
            float(np.mean(_scores(mean_F, cov_FF, features_NPF))), 4
        ),
        "sharp": SHARP,
        "shrink": round(shrink, 4),
    }
    return Natural(mean_F, cov_FF, patch, how)


def niqe(natural: Natural, images: np.ndarray) -> MetricResult:
    """Returns how far each picture's patches are from the training pictures'.

    The distance of NIQE, sqrt(d' ((S + S_i) / 2)^-1 d), of all patches of one picture;
    the value is its mean. `how` has the training pictures' own score beside it, by
    which the number is read: a perfect model comes near, or a little above where they
    are few, since the fit flatters what it was made on.

    Args: images: uint8 "N H W 3", of one size, preferably the training pictures'.
    Raises: UserError if the pictures have fewer than two patches.
    Source: Mittal et al. 2013, eq. 10, with a Gaussian of the caller's own in place of
      the published one; so it is not comparable with published NIQE numbers.
    """
    _, height, width, _ = images.shape
    if (height // natural.patch) * (width // natural.patch) < 2:
        raise UserError(
            f"pictures of {height}x{width} pixels hold fewer than two patches of "
            f"{natural.patch}; give pictures of the training pictures' size"
        )
    features_NPF, _ = _features(images, natural.patch)
    samples = _scores(natural.mean_F, natural.cov_FF, features_NPF)
    how = {
        "method": "NIQE, fitted on the training pictures",
        "pictures": len(images),
        "size": _size(images),
        "patch": natural.patch,
        "half_scale": "bicubic, antialiased",
    }
    value = float(np.mean(samples))
    return MetricResult(
        "niqe_fitted", value, samples, "worse quality", how | natural.how
    )


def sharpness(images: np.ndarray) -> MetricResult:
    """Returns the variance of the Laplacian of each picture's luminance, and its mean.

    Args: images: uint8 "N H W 3"; luminance in 0..255.
    Source: Pech-Pacheco et al. 2000 (doi 10.1109/ICPR.2000.903548); the numbers of
      OpenCV's Laplacian(grey, CV_64F).var() on that luminance, edges mirrored.
    """
    kernel = np.array([[[0, 1, 0], [1, -4, 1], [0, 1, 0]]], np.float64)
    samples = [
        np.var(ndimage.correlate(luminance(image[None]), kernel, mode="mirror"))
        for image in images
    ]
    samples = np.asarray(samples, np.float32)
    how = {
        "method": "variance of the Laplacian, 4 neighbours, luminance 0..255",
        "pictures": len(images),
        "size": _size(images),
    }
    return MetricResult("sharpness", float(np.mean(samples)), samples, "sharper", how)


def _features(images, patch):
    parts = [
        patch_features(images[first : first + BATCH], patch)
        for first in range(0, len(images), BATCH)
    ]
    features, sharp = zip(*parts, strict=True)
    return np.concatenate(features), np.concatenate(sharp)


def _scores(mean_F, cov_FF, features_NPF):
    """Returns each picture's distance, float32 "N"."""
    found = []
    for features_PF in features_NPF:
        d_F = np.mean(features_PF, axis=0) - mean_F
        both_FF = (cov_FF + np.cov(features_PF, rowvar=False)) / 2
        found.append(np.sqrt(d_F @ np.linalg.solve(both_FF, d_F)))
    return np.asarray(found, np.float32)


def _size(images):
    return f"{images.shape[1]}x{images.shape[2]}"
