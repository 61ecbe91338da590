# SPDX-License-Identifier: Apache-2.0
"""GIFT on Stable Diffusion 1.5 against learning again the style of one artist.

    python -m gift_jax.train --config configs/sd15_style.py --workdir runs/style

The malicious pictures are the model's own for the artist's name, drawn once and cached,
as in IMMA's experiments, which start from a model with the style erased (ESD-x):
`--config.model=DIR`, and the pictures in a folder, `--config.harmful.num_generated=0
--config.harmful.folder=PICTURES`, since an erased model cannot draw them.

Hardware: not yet run on an accelerator; see sd15_object.py for memory.

Published (IMMA's code): 20 pictures, 30 denoising steps, the prompt, rates of 1e-4
(lower, the attack's own) and 1e-5 (upper), 50 epochs of 20 updates. Ours: everything
else. The lower rate is not taken over: there it trains LoRA factors, here the weights
themselves. Result: not yet run.
"""

from ml_collections import ConfigDict

from gift_jax import train
from gift_jax.runtime import presets
from gift_jax.runtime.config import with_variant


def get_config(name: str = "") -> ConfigDict:
    c = presets.apply(train.get_config("gift"), presets.SD15)
    c.gift.update(ascent_bound="hinge", ascent_cap=4.0)  # ours; an untrained
    # predictor's loss is near 1
    c.upper.lr = 1e-5  # IMMA's outer rate for styles
    c.harmful.update(num_generated=20, prompt="An artwork by Van Gogh")
    c.safe.update(num_generated=200, prompt="An artwork")
    c.samples.prompts = (c.harmful.prompt, c.safe.prompt, "An artwork by Claude Monet")
    return with_variant(c, name, smoke=presets.SD15_SMOKE)
