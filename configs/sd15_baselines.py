# SPDX-License-Identifier: Apache-2.0
"""The methods that GIFT is compared with, on Stable Diffusion 1.5: a variant each.

    python -m gift_jax.train --config configs/sd15_baselines.py:esd --workdir runs/esd

esd (ESD-x of the paper), esd_new (of the authors' later code), uce, imma (against
DreamBooth), imma_lora, maximize_prior (MIMA's outer loss). Prompts and pictures are
those of configs/sd15_style.py; name your own with --config.harmful...

Published: ESD: 1,000 steps at 1e-5, batch 1, 50 DDIM steps with guidance 3 (later code:
200 at 5e-5, latents of the frozen model); UCE: regularization 0.5, erase and preserve
1, the last token, "art" in place of artists; IMMA: 1,000 updates, rates 5e-6 and 2e-5
(LoRA: 1e-4 and 1e-5), the attention trained, no limit on the ascent; MIMA: prior weight
1, outer rate 2e-5. Ours: the safe pictures, and AdamW without decay and clipping in
place of ESD's Adam.

Hardware: not yet run on an accelerator. Result: not yet run.
"""

from ml_collections import ConfigDict

from gift_jax import train
from gift_jax.runtime import presets

PLAIN = {"upper.weight_decay": 0.0, "upper.clip_norm": 0.0}
ESD = {"steps": 1000, "upper.lr": 1e-5, "esd.latents": "current", **PLAIN}
ESD_NEW = {"steps": 200, "upper.lr": 5e-5, "esd.timestep": "row", **PLAIN}
IMMA = {"trainable": "attention"}
IMMA_LORA = {"imma.inner_attack": "lora", "lower.lr": 1e-4, "upper.lr": 1e-5}
VARIANTS = {  # name: (method, overrides)
    "esd": ("esd", ESD),
    "esd_new": ("esd", ESD_NEW),
    "uce": ("uce", {"uce.replacement_prompt": "art"}),
    "imma": ("imma", IMMA),
    "imma_lora": ("imma", IMMA | IMMA_LORA),
    "maximize_prior": ("maximize_prior", {}),
}
DATA = {
    "harmful.num_generated": 20,
    "harmful.prompt": "An artwork by Van Gogh",
    "safe.num_generated": 200,
    "safe.prompt": "An artwork",
    "samples.prompts": (
        "An artwork by Van Gogh",
        "An artwork",
        "An artwork by Claude Monet",
    ),
}
SMOKE = presets.SD15_SMOKE | {"esd.trajectories": 2, "esd.steps": 4}


def get_config(name: str = "") -> ConfigDict:
    variant, is_smoke = presets.split_smoke(name, VARIANTS, "esd")
    method, overrides = VARIANTS[variant]
    c = presets.apply(train.get_config(method), presets.SD15, DATA, overrides)
    return presets.apply(c, SMOKE) if is_smoke else c
