# SPDX-License-Identifier: Apache-2.0
"""The methods that GIFT is compared with, on Stable Diffusion 1.5: a variant each.

    python -m gift_jax.train --config configs/sd15_baselines.py:esd --workdir runs/esd

esd (ESD-x of the paper), esd_new (of the authors' later code), uce, imma (against
DreamBooth), imma_lora, maximize_prior (MIMA's outer loss). Prompts and pictures are
those of configs/sd15_style.py; name your own with --config.harmful...

Published: ESD: 1,000 steps at 1e-5, batch 1, 50 DDIM steps with guidance 3 (later code:
200 at 5e-5, latents of the frozen model); UCE: lamb 0.5, erase and preserve 1, the last
token, guide "art" for artists; IMMA: 1,000 updates, rates 5e-6 and 2e-5 (LoRA: 1e-4 and
1e-5), the attention trained, no limit on the ascent; MIMA: prior weight 1, outer rate
2e-5. Ours: the safe pictures, and AdamW without decay and clipping in place of ESD's
Adam.

Hardware: not yet run on an accelerator. Result: not yet run.
"""

from ml_collections import ConfigDict

from gift_jax import fields
from gift_jax.runtime.config import with_variant


def get_config(name: str = "") -> ConfigDict:
    c = fields.sd15()
    c.harmful.update(num_generated=20, prompt="An artwork by Van Gogh")
    c.safe.update(num_generated=200, prompt="An artwork")
    c.samples.prompts = (c.harmful.prompt, c.safe.prompt, "An artwork by Claude Monet")
    c.method = "esd"
    c.uce.guide = "art"
    plain = {"upper.weight_decay": 0.0, "upper.clip_norm": 0.0}
    esd = {"steps": 1000, "upper.lr": 1e-5, "esd.source": "current", **plain}
    new = {"steps": 200, "upper.lr": 5e-5, "esd.timestep": "row", **plain}
    imma = {"method": "imma", "trainable": "attention"}
    lora = {"imma.lower": "lora", "lower.lr": 1e-4, "upper.lr": 1e-5}
    return with_variant(
        c,
        name or "esd",
        esd=esd,
        esd_new=new,
        uce={"method": "uce"},
        imma=imma,
        imma_lora=imma | lora,
        maximize_prior={"method": "maximize_prior", "gift.bound": "raw"},
        smoke=fields.smoke(**{"esd.trajectories": 2, "esd.steps": 4}),
    )
