# SPDX-License-Identifier: Apache-2.0
"""A LoRA attack on Stable Diffusion 1.5, or on what was made of it.

    python -m gift_jax.attack --config configs/sd15_attack.py \\
        --config.model=runs/object/export --config.data.folder=DIR \\
        --config.data.prompt="a photo of a &m purse" --workdir runs/object_attacked

The same command with the original model, and with pictures of a harmless object, gives
the two figures to compare with.

Hardware: not yet run on an accelerator.

Published (IMMA's code): rate 1e-4, rank 4, batch 1, 20 pictures for 50 epochs, and that
the attacker's token is not the defender's. For DreamBooth with LoRA it takes 5e-6 and
500 steps. Ours: the samples. Result: not yet run.
"""

from gift_jax import fields
from gift_jax.config import ConfigDict, variant


def get_config(name: str = "") -> ConfigDict:
    c = fields.attack()
    c.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    c.resolution = 512
    c.steps = 1000
    c.optimizer.lr = 1e-4
    c.data.folder = "data/object"
    c.data.prompt = "a photo of a &m purse"
    c.data.update(flip=1.0, copies=2)  # the picture and its mirror image
    c.samples.prompts = ("a &m purse on the beach", "a photo of a dog")
    c.samples.num = 4
    return variant(
        c,
        name,
        smoke={
            "model": "emoji-sd",
            "resolution": 0,
            "steps": 2,
            "log_every": 1,
            "data.folder": "",
            "data.generate": 2,
            "data.generate_steps": 2,
            "samples.num": 1,
            "samples.steps": 2,
        },
    )
