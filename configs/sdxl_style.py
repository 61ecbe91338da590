# SPDX-License-Identifier: Apache-2.0
"""GIFT on Stable Diffusion XL against learning again the style of one artist.

    python -m gift_jax.train --config configs/sdxl_style.py --workdir runs/style

As sd15_style.py, at 1024 pixels; memory and devices: sdxl_object.py.

Hardware: not yet run on an accelerator. Result: not yet run. Every constant beside the
model's own size is that of sd15_style.py, and not tuned for SDXL.
"""

from ml_collections import ConfigDict

from gift_jax import train
from gift_jax.runtime import presets
from gift_jax.runtime.config import with_variant


def get_config(name: str = "") -> ConfigDict:
    c = presets.apply(train.get_config("gift"), presets.SDXL)
    c.gift.update(ascent_bound="hinge", ascent_cap=4.0)
    c.upper.lr = 1e-5  # as sd15_style.py
    c.harmful.update(num_generated=20, prompt="An artwork by Van Gogh")
    c.safe.update(num_generated=200, prompt="An artwork")
    c.samples.prompts = (c.harmful.prompt, c.safe.prompt, "An artwork by Claude Monet")
    return with_variant(c, name, smoke=presets.SD15_SMOKE)
