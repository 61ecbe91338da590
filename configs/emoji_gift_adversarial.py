# SPDX-License-Identifier: Apache-2.0
"""GIFT with an attacker in the loop, on the embedded model against one concept.

    python -m gift_jax.train --config configs/emoji_gift_adversarial.py \\
        --workdir runs/gift_adversarial

Hardware: two CPU cores. Every constant is ours. What it holds against, and what not:
docs/lab.
"""

from ml_collections import ConfigDict

from gift_jax import train
from gift_jax.runtime import presets
from gift_jax.runtime.config import with_variant


def get_config(name: str = "") -> ConfigDict:
    c = presets.apply(train.get_config("gift_adversarial"), presets.EMOJI)
    c.steps = 500
    s = c.gift_adversarial
    s.beta = 0.02  # weight of representation noising; RepNoise's is 1e-3
    s.noise_target = "matched"  # "from the same distribution"
    s.lower_target = "model"  # a target without noise: safe things are kept better
    s.inner_steps = 2  # with one, what moves the attacker takes safe things along
    s.lower_loss_limit = 0.08  # two of eight concepts ran away without, none with
    s.attacker.update(restart_every=30, steps_min=1, steps_max=1)
    s.attacker.update(lr_min=1e-4, lr_max=3e-4)  # DreamBooth's rate to three times it
    for level, lr in ((c.lower, 1.2e-3), (c.upper, 3e-3)):
        level.update(lr=lr, warmup_frac=0.05, weight_decay=0.0, schedule="cosine")
    c.harmful.nonce_prompts = 0.5  # attackers give what they teach a new name
    c.safe.nonce_prompts = 0.1
    s.post_finetune.update(
        steps=100, lr=4e-4, schedule="cosine"
    )  # repairs what is safe
    smoke = presets.EMOJI_SMOKE | {"gift_adversarial.post_finetune.steps": 0}
    return with_variant(c, name, smoke=smoke)
