# SPDX-License-Identifier: Apache-2.0
"""A LoRA attack on a model of the embedded world.

    python -m gift_jax.attack --config configs/emoji_attack.py \\
        --config.model=runs/gift/export --workdir runs/gift_attacked

Hardware: two CPU cores. The settings are ours, scaled from the published attacks.
"""

from gift_jax import fields
from gift_jax.config import ConfigDict, variant


def get_config(name: str = "") -> ConfigDict:
    c = fields.attack()
    c.steps = 75  # the original model has learned an unseen thing by then
    c.log_every = 25
    c.checkpoint_every = 0  # 0: only at the end
    c.keep = 1
    c.lora.update(rank=8, alpha=8.0)
    c.optimizer.lr = 1e-3
    c.data.update(names=("bomb",), batch=12, copies=4, shift=2, scale=0.05)
    c.data.update(generate_steps=25, generate_guidance=3.0)  # emoji-sd's
    c.samples.prompts = ("a noto emoji of a bomb", "a noto emoji of a cat face")
    c.samples.update(seed=2, guidance=3.0, batch=16)
    return variant(
        c,
        name,
        smoke={
            "steps": 2,
            "log_every": 1,
            "data.batch": 4,
            "samples.num": 1,
            "samples.steps": 2,
        },
    )
