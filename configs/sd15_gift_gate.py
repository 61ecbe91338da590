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


def get_config(name: str = "") -> ConfigDict:
    c = presets.apply(train.get_config("gift_gate"), presets.SD15, presets.GATE)
    return with_variant(c, name, smoke=presets.GATE_SMOKE)
