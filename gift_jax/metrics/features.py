# SPDX-License-Identifier: Apache-2.0
"""The features of two sets of images, to be compared as distributions."""

from typing import Any

import numpy as np

from gift_jax.metrics.backbone import Backbone
from gift_jax.metrics.base import EvalSet
from gift_jax.runtime.errors import UserError


def of_sets(
    backbone: Backbone, eval_set: EvalSet
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Returns (real "R D", generated "N D", provenance): features as the model gives.

    Float64, not normalized.

    Raises: UserError if they are not finite.
    """
    real_RD = backbone.features(eval_set.reference_images).astype(np.float64)
    fake_ND = backbone.features(eval_set.images).astype(np.float64)
    if not (np.isfinite(real_RD).all() and np.isfinite(fake_ND).all()):
        raise UserError("features must be finite; the backbone gave inf or nan")
    provenance = backbone.provenance | {
        "preparation": "whole images, squeezed to the square",
        "features": real_RD.shape[1],
        "n_real": len(real_RD),
        "n_generated": len(fake_ND),
    }
    return real_RD, fake_ND, provenance


def check_counts(real_RD: np.ndarray, fake_ND: np.ndarray, low: int) -> None:
    """Raises UserError for a set of fewer than `low` images."""
    fewest = min(len(real_RD), len(fake_ND))
    if fewest < low:
        raise UserError(f"a set of {fewest} images; must have {low} or more")
