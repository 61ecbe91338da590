# SPDX-License-Identifier: Apache-2.0
"""GIFT with a gate on Stable Diffusion XL, against one thing that the model can draw.

    python -m gift_jax.train --config configs/sdxl_gift_gate.py --workdir runs/gate \\
        --config.harmful.folder=DIR --config.harmful.prompt="a gun"

As sd15_gift_gate.py, at 1024 pixels. The second phase trains all 2.6 B parameters of
the UNet with the original beside it: 48 GB without activations (gift-jax doctor). On
eight devices: --config.hardware.mesh.fsdp=8 --config.hardware.shard_frozen=true.

Every constant is that of sd15_gift_gate.py, and not tuned for SDXL. Hardware: not yet
run on an accelerator. Result: not yet run.
"""

from ml_collections import ConfigDict

from gift_jax import train
from gift_jax.runtime import presets
from gift_jax.runtime.config import with_variant


def get_config(name: str = "") -> ConfigDict:
    c = presets.apply(train.get_config("gift_gate"), presets.SDXL, presets.GATE)
    for group in (c.harmful, c.safe):
        group.shift = 64  # pixels of 1024
    return with_variant(c, name, smoke=presets.GATE_SMOKE)
