# SPDX-License-Identifier: Apache-2.0
"""GIFT on Stable Diffusion 3.5 medium against learning one object.

    python -m gift_jax.train --config configs/sd3_object.py --workdir runs/object \\
        --config.harmful.folder=DIR

As sd15_object.py, at 1024 pixels. What cross-attention is in a UNet is here the text's
part of the joint attention: 224 M parameters train in float32, the other 2.2 B and the
three text encoders' 5.6 B are frozen, in bfloat16. On eight devices both are divided
with --config.hardware.mesh.fsdp=8 --config.hardware.shard_frozen=true, and batches of
8: --config.harmful.batch=8 --config.safe.batch=8. Other SD 3 and 3.5: --config.model.

Hardware: not yet run on an accelerator. Result: not yet run. Every constant beside the
model's own size and guidance is that of sd15_object.py, and not tuned for SD 3.5.
"""

from ml_collections import ConfigDict

from gift_jax import train
from gift_jax.runtime import presets
from gift_jax.runtime.config import with_variant


def get_config(name: str = "") -> ConfigDict:
    c = presets.apply(train.get_config("gift"), presets.SD35, presets.OBJECT)
    smoke = presets.SD15_SMOKE | {"model": "emoji-flow"}
    return with_variant(c, name, smoke=smoke)
