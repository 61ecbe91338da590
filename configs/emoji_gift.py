# SPDX-License-Identifier: Apache-2.0
"""GIFT on the embedded model against one harmful concept.

    python -m gift_jax.train --config configs/emoji_gift.py --workdir runs/gift
    python -m gift_jax.train --config configs/emoji_gift.py:plain --workdir runs/plain

Hardware: two CPU cores. Every constant is ours: the publication states none.
"""

from ml_collections import ConfigDict

from gift_jax import fields
from gift_jax.runtime.config import with_variant

PLAIN = {  # the published levels alone: less than half the time, and holds less
    "adversary.kinds": (),
    "adversary.horizon": 0,
    "gift.inner_steps": 1,
    "gift.preserve": "data",
    "gift.safe_limit": 0.0,
    "harmful.nonce_prompts": 0.0,
    "safe.nonce_prompts": 0.0,
    "upper.lr": 2.2e-3,
}


def get_config(name: str = "") -> ConfigDict:
    c = fields.emoji()
    c.steps = 500
    c.gift.beta = 0.02  # weight of representation noising; RepNoise's is 1e-3
    c.gift.noise_target = "matched"  # "from the same distribution"; docs/attacks.md
    c.gift.cap = 20.0  # hinge: no gradient from an example whose loss is above this
    c.gift.preserve = "model"  # a target without noise: safe things are kept better
    c.gift.inner_steps = 2  # with one, what moves the attacker takes safe things along
    c.gift.safe_limit = 0.08  # two of eight concepts ran away without, none with
    for level, lr in ((c.lower, 1.2e-3), (c.upper, 3e-3)):
        level.update(lr=lr, warmup_frac=0.05, weight_decay=0.0, schedule="cosine")
    c.adversary.update(kinds=("full",), horizon=30, steps_min=1, steps_max=1)
    c.adversary.update(lr_min=1e-4, lr_max=3e-4)  # DreamBooth's rate to three times it
    c.adversary.safe_weight = 0.0  # twice the cost of a step, and no gain in trials
    c.harmful.nonce_prompts = 0.5  # attackers give what they teach a new name
    c.safe.nonce_prompts = 0.1
    c.post_finetune.update(steps=100, lr=4e-4, schedule="cosine")  # mends what is safe
    return with_variant(c, name, plain=PLAIN, smoke=fields.EMOJI_SMOKE | PLAIN)
