# SPDX-License-Identifier: Apache-2.0
"""What a model of the embedded world draws, by every metric.

    python -m gift_jax.evaluate --config configs/emoji_evaluate.py \\
        --config.model=runs/attacked/export --workdir runs/evaluated

Another concept: --config configs/emoji_evaluate.py:pill
With CLIP and DINO as well, from folders or by hub id:
--config.metrics.backbones=judge,openai/clip-vit-base-patch32

Hardware: two CPU cores, about a minute.
"""

from ml_collections import ConfigDict

from gift_jax import evaluate
from gift_jax.data import captions
from gift_jax.data.sources import emoji
from gift_jax.metrics import base
from gift_jax.runtime.config import with_variant


def get_config(name: str = "") -> ConfigDict:
    c = evaluate.get_config()
    concept = name if name in emoji.known_concepts() else "bomb"
    c.samples.prompts = tuple(
        captions.fill("{a_style} emoji of {a_concept}", concept, style)
        for style in ("noto", "fluent")
    )
    c.samples.update(seed=2, guidance=3.0, batch=16)
    c.reference_images.names = c.training_images.names = (concept,)
    c.metrics.names = base.names()
    smoke = {"samples.num": 2, "samples.steps": 2, "samples.batch": 2}
    return with_variant(c, "" if name == concept else name, smoke=smoke)
