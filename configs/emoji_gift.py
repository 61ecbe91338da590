# SPDX-License-Identifier: Apache-2.0
"""GIFT on the embedded model against one forbidden concept.

    python -m gift_jax.train --config configs/emoji_gift.py --workdir runs/gift
    python -m gift_jax.train --config configs/emoji_gift.py:adversary --workdir ...

Hardware: two CPU cores. Every constant is ours: the publication states none.
"""

from gift_jax import fields
from gift_jax.config import ConfigDict, variant

ADVERSARY = {  # one that fine-tunes beside the training, for 30 steps on average
    "adversary.kinds": ("full",),
    "adversary.horizon": 30,
    "adversary.steps_min": 1,
    "adversary.steps_max": 1,
    "adversary.lr_min": 1e-4,  # DreamBooth's usual rate, up to three times that
    "adversary.lr_max": 3e-4,
    "adversary.safe_weight": 0.0,  # twice the cost of a step, and no gain in trials
    "steps": 500,
    "gift.inner_steps": 2,  # with one, what holds costs the known safe things
    "gift.preserve": "model",  # a target without noise: they are kept better
    "lower.schedule": "cosine",
    "upper.lr": 3e-3,
    "post_finetune.schedule": "cosine",
    "harmful.identifier_prompts": 0.5,  # attackers give what they teach a new name
    "safe.identifier_prompts": 0.1,
}


def get_config(name: str = "") -> ConfigDict:
    c = fields.emoji()
    c.gift.beta = 0.02  # weight of representation noising; RepNoise's is 1e-3
    c.gift.noise_target = "matched"  # noise "from the same distribution"
    c.gift.cap = 20.0  # hinge: no gradient from an example whose loss is above this
    for level, lr in ((c.lower, 1.2e-3), (c.upper, 2.2e-3)):
        level.update(lr=lr, warmup_frac=0.05, weight_decay=0.0)
    c.upper.schedule = "cosine"  # so that the last steps mend more than they degrade
    c.post_finetune.update(steps=100, lr=4e-4)  # brings back most of what is safe
    return variant(c, name, adversary=ADVERSARY, smoke=fields.EMOJI_SMOKE)
