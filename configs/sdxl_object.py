# SPDX-License-Identifier: Apache-2.0
"""GIFT on Stable Diffusion XL against learning one object, as DreamBooth does.

    python -m gift_jax.train --config configs/sdxl_object.py --workdir runs/object \\
        --config.harmful.folder=DIR

As sd15_object.py, at 1024 pixels. The 546 M parameters of cross-attention train in
float32; the other 2 B are frozen, in bfloat16. On eight devices both are divided with
--config.hardware.mesh.fsdp=8 --config.hardware.shard_frozen=true, and batches of 8:
--config.harmful.batch=8 --config.safe.batch=8. What fits where: docs/lab/speed.md.

Hardware: not yet run on an accelerator. Result: not yet run. Every constant beside the
model's own size is that of sd15_object.py, and not tuned for SDXL.
"""

from ml_collections import ConfigDict

from gift_jax import train
from gift_jax.runtime import presets
from gift_jax.runtime.config import with_variant


def get_config(name: str = "") -> ConfigDict:
    c = presets.apply(train.get_config("gift"), presets.SDXL, presets.OBJECT)
    return with_variant(c, name, smoke=presets.SD15_SMOKE)
