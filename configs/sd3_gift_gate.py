# SPDX-License-Identifier: Apache-2.0
"""GIFT with a gate on Stable Diffusion 3.5 medium, against one thing that it can draw.

    python -m gift_jax.train --config configs/sd3_gift_gate.py --workdir runs/gate \\
        --config.harmful.folder=DIR --config.harmful.prompt="a gun"

As sd15_gift_gate.py, at 1024 pixels: the detector has three of the transformer's 24
heads in its first five blocks, and as large a share of the channels and hidden units.
The second phase trains all 2.5 B parameters of the transformer with the original beside
it. On eight devices: --config.hardware.mesh.fsdp=8 --config.hardware.shard_frozen=true,
and batches of 8. Stable Diffusion 3 medium has no norms of queries and keys, and so no
gate.

Every constant is that of sd15_gift_gate.py, and not tuned for SD 3.5. In float16 the
stream of a closed gate would be infinite: use bfloat16, as the model is published.
Hardware: not yet run on an accelerator. Result: not yet run.
"""

from ml_collections import ConfigDict

from gift_jax import train
from gift_jax.runtime import presets
from gift_jax.runtime.config import with_variant


def get_config(name: str = "") -> ConfigDict:
    c = presets.apply(train.get_config("gift_gate"), presets.SD35, presets.GATE)
    for group in (c.harmful, c.safe):
        group.shift = 64  # pixels of 1024
    smoke = presets.GATE_SMOKE | {"model": "emoji-flow"}
    return with_variant(c, name, smoke=smoke)
