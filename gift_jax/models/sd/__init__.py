# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.x, 2.x and XL: the modules, and how to apply them."""

from gift_jax.models.sd.clip import apply_text, build_text
from gift_jax.models.sd.components import KINDS
from gift_jax.models.sd.unet import (
    CAPTURE_KINDS,
    apply_unet,
    build_unet,
    project_text,
)
from gift_jax.models.sd.vae import apply_vae_decode, apply_vae_encode, build_vae

__all__ = [
    "CAPTURE_KINDS",
    "KINDS",
    "apply_text",
    "apply_unet",
    "apply_vae_decode",
    "apply_vae_encode",
    "build_text",
    "build_unet",
    "build_vae",
    "project_text",
]
