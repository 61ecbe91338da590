# SPDX-License-Identifier: Apache-2.0
"""FLUX.1: its transformer, whose other components are Stable Diffusion 3's kinds."""

from gift_jax.models.flux.components import KIND_OF, KINDS
from gift_jax.models.flux.trainable import TRAINABLE_SETS
from gift_jax.models.flux.transformer import build_transformer

__all__ = ["KINDS", "KIND_OF", "TRAINABLE_SETS", "build_transformer"]
