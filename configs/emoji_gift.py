# SPDX-License-Identifier: Apache-2.0
"""GIFT, as published, on the embedded model against one harmful concept.

    python -m gift_jax.train --config configs/emoji_gift.py --workdir runs/gift

Hardware: two CPU cores. Every constant is ours: the publication states none.
configs/emoji_gift_adversarial.py holds against longer attacks.
"""

from ml_collections import ConfigDict

from gift_jax import train
from gift_jax.runtime import presets
from gift_jax.runtime.config import with_variant


def get_config(name: str = "") -> ConfigDict:
    c = presets.apply(train.get_config("gift"), presets.EMOJI)
    c.steps = 500
    c.gift.beta = 0.02  # weight of representation noising; RepNoise's is 1e-3
    c.gift.noise_target = "matched"  # "from the same distribution"
    for level, lr in ((c.lower, 1.2e-3), (c.upper, 2.2e-3)):
        level.update(lr=lr, warmup_frac=0.05, weight_decay=0.0, schedule="cosine")
    return with_variant(c, name, smoke=presets.EMOJI_SMOKE)
