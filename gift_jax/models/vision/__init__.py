# SPDX-License-Identifier: Apache-2.0
"""Models that look at images: CLIP, ViT, DINOv2, ResNet."""

from gift_jax.models.vision.clip import (
    CLIP,
    apply_clip_image,
    apply_clip_stages,
    apply_clip_text,
    build_clip,
)
from gift_jax.models.vision.components import KINDS
from gift_jax.models.vision.resnet import apply_classifier, build_resnet_classifier
from gift_jax.models.vision.vit import (
    apply_vision,
    build_dinov2,
    build_vit,
    build_vit_classifier,
)

__all__ = [
    "CLIP",
    "KINDS",
    "apply_classifier",
    "apply_clip_image",
    "apply_clip_stages",
    "apply_clip_text",
    "apply_vision",
    "build_clip",
    "build_dinov2",
    "build_resnet_classifier",
    "build_vit",
    "build_vit_classifier",
]
