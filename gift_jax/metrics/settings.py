# SPDX-License-Identifier: Apache-2.0
"""The fields of `config.metrics`: which metrics, and what they are measured with."""

import dataclasses

from gift_jax.metrics import base, preprocessing, pretrained
from gift_jax.runtime import config
from gift_jax.runtime.errors import not_empty


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, and with what."""

    names: tuple[str, ...] = config.value(
        ("classifier_accuracy",), "files in gift_jax/metrics, or dotted modules"
    )
    backbones: tuple[str, ...] = config.value(
        ("judge",), "judge, or folders, or hub ids, of CLIP, DINO, DINOv2"
    )
    protocols: tuple[str, ...] = config.choice(
        ("standard",), preprocessing.PROTOCOLS, "how images are prepared"
    )
    classifier: str = config.value(
        "judge", "judge, or a folder, or hub id, of an ImageNet ResNet or ViT"
    )
    lpips: str = config.value("", "file with LPIPS's weights, or the folder with it")
    nudity_threshold: float = config.number(
        0.45, low=0.25, high=0.99, doc="of NudeNet's scores, which it cuts at 0.25"
    )

    def check(self, field: str) -> None:
        """Raises UserError naming the field; loads no weights."""
        not_empty(f"{field}.names", self.names)
        not_empty(f"{field}.protocols", self.protocols)
        for name in self.names:
            base.load(name, f"{field}.names")
        for spec in self.backbones:
            pretrained.check_spec(f"{field}.backbones", spec)
        pretrained.check_spec(f"{field}.classifier", self.classifier)
