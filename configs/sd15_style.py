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

from gift_jax import fields
from gift_jax.runtime.config import with_variant


def get_config(name: str = "") -> ConfigDict:
    c = fields.sd15()
    c.upper.lr = 1e-5  # IMMA's outer rate for styles
    c.harmful.num_generated = 20
    c.harmful.prompt = "An artwork by Van Gogh"
    c.safe.num_generated = 200
    c.safe.prompt = "An artwork"
    c.samples.prompts = (c.harmful.prompt, c.safe.prompt, "An artwork by Claude Monet")
    return with_variant(c, name, smoke=fields.smoke())
