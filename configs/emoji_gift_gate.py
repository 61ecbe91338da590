# SPDX-License-Identifier: Apache-2.0
"""GIFT with a gate, on the embedded model against one concept: the default.

    python -m gift_jax.train --config configs/emoji_gift_gate.py --workdir runs/gate

    --config configs/emoji_gift_gate.py:style   of a style, which many things have: more
                                                channels and steps; colors as they are
    --config configs/emoji_gift_gate.py:demo    what `make demo` takes: fewer images and
                                                steps, in a third of the time

Hardware: two CPU cores. Every constant is ours. What it holds against, and what not:
docs/lab/gate.md.
"""

from ml_collections import ConfigDict

from gift_jax import train
from gift_jax.runtime import presets
from gift_jax.runtime.config import with_variant


def get_config(name: str = "") -> ConfigDict:
    c = presets.apply(train.get_config("gift_gate"), presets.EMOJI)
    c.steps = 3000
    c.log_every = 100
    c.checkpoints.every = 500
    c.harmful.update(batch=64, num_drawn=360)
    c.safe.update(batch=64, num_drawn=720)
    for group in (c.harmful, c.safe):
        group.drawn_prompts = ("{a_style} emoji of {a_concept}",)
        group.update(augmented_copies=4, flip=0.5, shift=4, scale=0.1)
        group.update(rotate=10.0, color=0.4)
    c.upper.update(lr=3e-3, schedule="cosine", weight_decay=0.0, clip_norm=0.0)
    c.lower.update(lr=1e-3, schedule="cosine", weight_decay=0.0)
    smoke = presets.EMOJI_SMOKE | {
        "gift_gate.preserve_steps": 1,
        "harmful.num_drawn": 2,
        "safe.num_drawn": 2,
        "harmful.generation.steps": 2,
        "safe.generation.steps": 2,
    }
    style = {
        "steps": 8000,
        "gift_gate.share": 0.25,
        "gift_gate.safe_weight": 2.0,
        "harmful.color": 0.0,
        "harmful.rotate": 0.0,
        "safe.color": 0.0,
        "safe.rotate": 0.0,
    }
    demo = {
        "steps": 3000,
        "gift_gate.preserve_steps": 80,
        "safe.num_drawn": 400,
        "harmful.batch": 48,
        "safe.batch": 48,
        "harmful.augmented_copies": 3,
        "safe.augmented_copies": 3,
    }
    return with_variant(c, name, smoke=smoke, style=style, demo=demo)
