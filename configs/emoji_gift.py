# SPDX-License-Identifier: Apache-2.0
"""GIFT on the embedded model against one forbidden concept.

    python -m gift_jax.train --config configs/emoji_gift.py --workdir runs/gift

Hardware: two CPU cores. Every constant is ours: the publication states none.
"""

from gift_jax import fields
from gift_jax.config import ConfigDict, variant


def get_config(name: str = "") -> ConfigDict:
    c = fields.gift()
    c.steps = 300  # outer steps
    c.gift.beta = 0.02  # weight of representation noising; RepNoise's is 1e-3
    c.gift.cap = 20.0  # hinge: no gradient from an example whose loss is above this
    for level, lr in ((c.lower, 1.2e-3), (c.upper, 2.2e-3)):
        level.update(lr=lr, warmup_frac=0.05, weight_decay=0.0)
    c.upper.schedule = "cosine"  # so that the last steps mend more than they degrade
    c.harmful.update(names=("bomb",), batch=12)
    c.safe.update(names=("known-safe",), batch=24)
    c.safe.empty_prompts = 0.1  # as the model was trained; guidance needs them intact
    for group in (c.harmful, c.safe):
        group.update(copies=4, shift=2, scale=0.05)
        group.update(generate_steps=25, generate_guidance=3.0)  # emoji-sd's
    c.samples.prompts = ("a noto emoji of a bomb", "a noto emoji of a cat face")
    c.samples.update(guidance=3.0, batch=16)
    return variant(
        c,
        name,
        smoke={
            "steps": 2,
            "log_every": 1,
            "harmful.batch": 4,
            "safe.batch": 4,
            "safe.names": ("cat face",),
            "samples.num": 1,
            "samples.steps": 2,
        },
    )
