# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5: the modules, and how to apply them."""

from gift_jax.models.mmdit.components import KIND_OF, KINDS
from gift_jax.models.mmdit.t5 import apply_t5, build_t5
from gift_jax.models.mmdit.trainable import TRAINABLE_SETS
from gift_jax.models.mmdit.transformer import (
    CAPTURE_KINDS,
    apply_transformer,
    build_transformer,
)

__all__ = [
    "CAPTURE_KINDS",
    "KINDS",
    "KIND_OF",
    "TRAINABLE_SETS",
    "apply_t5",
    "apply_transformer",
    "build_t5",
    "build_transformer",
]
