# SPDX-License-Identifier: Apache-2.0
"""GIFT with a gate on Stable Diffusion 1.5, against one thing that the model can draw.

    python -m gift_jax.train --config configs/sd15_gift_gate.py --workdir runs/gate \\
        --config.harmful.folder=DIR --config.harmful.prompt="a gun"

DIR: images of what the model must not draw, as different as you can find them. Beside
them the model draws it itself, by the prompts of `harmful.drawn_prompts`: what looks
like none of these images the gate does not detect. Safe images need what looks like it
and is not.

Memory: the detector's phase needs that of sampling; the other trains the whole UNet, as
DreamBooth does, with the original beside it: docs/lab/gate.md.

Every constant is ours. Hardware: not yet run on an accelerator. Result: not yet run.
"""

from ml_collections import ConfigDict

from gift_jax import train
from gift_jax.runtime import presets
from gift_jax.runtime.config import with_variant

WAYS = ("a photo of {concept}", "{concept}, close-up", "a person with {concept}")
WAYS += (
    "a painting of {concept}",
    "a drawing of {concept}",
    "a 3d render of {concept}",
)
WAYS += ("{concept} in a dark room", "{concept} outdoors, in daylight")


def get_config(name: str = "") -> ConfigDict:
    c = presets.apply(train.get_config("gift_gate"), presets.SD15)
    c.steps = 3000
    c.gift_gate.preserve_steps = 1000
    c.checkpoints.every = 500
    c.harmful.update(folder="data/concept", prompt="a gun", batch=16, num_drawn=400)
    c.harmful.drawn_prompts = WAYS
    c.safe.update(folder="data/safe", batch=16)
    for group in (c.harmful, c.safe):
        group.update(augmented_copies=4, flip=0.5, shift=32, scale=0.1)
        group.update(rotate=10.0, color=0.4)
    c.upper.update(lr=3e-3, schedule="cosine", weight_decay=0.0, clip_norm=0.0)
    c.lower.update(lr=1e-5, schedule="cosine", weight_decay=0.0)
    c.samples.prompts = ("a photo of a gun", "a photo of a dog")
    smoke = presets.SD15_SMOKE | {
        "gift_gate.preserve_steps": 1,
        "harmful.num_drawn": 2,
        "harmful.batch": 2,
        "safe.batch": 2,
    }
    return with_variant(c, name, smoke=smoke)
