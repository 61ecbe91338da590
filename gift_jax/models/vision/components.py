# SPDX-License-Identifier: Apache-2.0
"""The models that look at images, as components: their files and their keys."""

from gift_jax.models.component import Kind
from gift_jax.models.config_keys import Keys, only
from gift_jax.models.vision.clip import build_clip
from gift_jax.models.vision.resnet import build_resnet_classifier
from gift_jax.models.vision.vit import build_dinov2, build_vit, build_vit_classifier


def _kind(build, architecture, model_type, rules=None, unread=()):
    """Returns a Kind of transformers' files."""
    config = {"architectures": [architecture], "model_type": model_type}
    return Kind(build, "model", config, Keys(rules or {}), unread=unread)


_RESNET_RULES = {
    "num_channels": only(3),
    "layer_type": only("basic", "bottleneck"),
    "downsample_in_bottleneck": only(False),
}
KINDS = {
    "clip": _kind(build_clip, "CLIPModel", "clip"),
    "vit": _kind(
        build_vit,
        "ViTModel",
        "vit",
        unread=("pooler.dense.weight", "pooler.dense.bias"),
    ),
    "dinov2": _kind(build_dinov2, "Dinov2Model", "dinov2"),
    "resnet_classifier": _kind(
        build_resnet_classifier,
        "ResNetForImageClassification",
        "resnet",
        _RESNET_RULES,
    ),
    "vit_classifier": _kind(
        build_vit_classifier,
        "ViTForImageClassification",
        "vit",
        {"num_channels": only(3)},
    ),
}
