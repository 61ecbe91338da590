# SPDX-License-Identifier: Apache-2.0
"""The methods that GIFT is compared with, on the embedded model: a variant each.

    python -m gift_jax.train --config configs/emoji_baselines.py:esd --workdir runs/esd

esd, uce, imma, imma_lora, maximize, maximize_prior; and NAME_smoke, two steps of each.

Hardware: two CPU cores. The constants are ours; the published settings are in
configs/sd15_baselines.py. Tried on "bomb", 24 samples, the judge's recognition before
100%: esd 8% after 200 steps at 3e-4, 0% at 1e-3; uce 0%, while 12 other known things
stay at 97% and 100%. imma has no safe data: with 300 steps at 5e-4 every known thing
was lost, with these a bomb still comes back. What all of them reach: docs/lab.
"""

from ml_collections import ConfigDict

from gift_jax import train
from gift_jax.runtime import presets

IMMA = {"imma.ascent_bound": "hinge"}  # published without a limit
IMMA_ATTENTION = {"trainable": "attention", "steps": 120, "upper.lr": 3e-4}
ASCENT = {"lower.lr": 1.2e-3, "upper.lr": 2.2e-3, "upper.schedule": "cosine"}
VARIANTS = {  # name: (method, overrides)
    "esd": ("esd", {"steps": 200, "harmful.batch": 8, "esd.trajectories": 24}),
    "uce": (
        "uce",
        {"uce.replacement_prompt": "{a_style} emoji", "uce.token_states": "tail"},
    ),
    "imma": ("imma", IMMA | IMMA_ATTENTION),
    "imma_lora": ("imma", IMMA | {"imma.inner_attack": "lora", "lower.lr": 1e-3}),
    "maximize": ("maximize", {"steps": 50, "maximize.ascent_bound": "hinge"}),
    "maximize_prior": (
        "maximize_prior",
        ASCENT | {"maximize_prior.ascent_bound": "hinge"},
    ),
}
RATES = {
    "lower.lr": 1e-4,
    "lower.weight_decay": 0.0,
    "upper.lr": 5e-4,
    "upper.weight_decay": 0.0,
}
SMOKE = presets.EMOJI_SMOKE | {"esd.trajectories": 2, "esd.steps": 4}


def get_config(name: str = "") -> ConfigDict:
    variant, is_smoke = presets.split_smoke(name, VARIANTS, "esd")
    method, overrides = VARIANTS[variant]
    c = presets.apply(train.get_config(method), presets.EMOJI, RATES, overrides)
    return presets.apply(c, SMOKE) if is_smoke else c
