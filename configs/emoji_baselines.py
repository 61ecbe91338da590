# SPDX-License-Identifier: Apache-2.0
"""The methods that GIFT is compared with, on the embedded model: a variant each.

    python -m gift_jax.train --config configs/emoji_baselines.py:esd --workdir runs/esd

esd, uce, imma, imma_lora, maximize, maximize_prior; and smoke, which takes two steps of
whatever --config.method says.

Hardware: two CPU cores. The constants are ours; methods and their published settings
are in docs/method.md and configs/sd15_baselines.py. Tried on "bomb", 24 samples, the
judge's recognition before 100%: esd 8% after 200 steps at 3e-4, 0% at 1e-3; uce 0%,
while 12 other known things stay at 97% and 100%. imma has no safe data: with 300 steps
at 5e-4 every known thing was lost, with these a bomb still comes back. What all of them
reach: docs/attacks.md.
"""

from ml_collections import ConfigDict

from gift_jax import fields
from gift_jax.runtime.config import with_variant

IMMA = {"steps": 120, "upper.lr": 3e-4}


def get_config(name: str = "") -> ConfigDict:
    c = fields.emoji()
    c.method = "esd"
    c.lower.update(lr=1e-4, weight_decay=0.0)
    c.upper.update(lr=5e-4, weight_decay=0.0)
    c.gift.cap = 20.0
    c.imma.update(bound="hinge", cap=20.0)  # published without a limit
    c.uce.update(guide="{a_style} emoji", states="tail")
    ascent = {"lower.lr": 1.2e-3, "upper.lr": 2.2e-3, "upper.schedule": "cosine"}
    return with_variant(
        c,
        name or "esd",
        esd={"steps": 200, "harmful.batch": 8, "esd.trajectories": 24},
        uce={"method": "uce"},
        imma={"method": "imma", "trainable": "attention", **IMMA},
        imma_lora={"method": "imma", "imma.lower": "lora", "lower.lr": 1e-3},
        maximize={"method": "maximize", "steps": 50},
        maximize_prior={"method": "maximize_prior", **ascent},
        smoke=fields.EMOJI_SMOKE | {"esd.trajectories": 2, "esd.steps": 4},
    )
