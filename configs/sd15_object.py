# SPDX-License-Identifier: Apache-2.0
"""GIFT on Stable Diffusion 1.5 against learning one object, as DreamBooth does.

    python -m gift_jax.train --config configs/sd15_object.py --workdir runs/object \\
        --config.harmful.folder=DIR

DIR: a few pictures of the object (IMMA's experiments take CustomConcept101's, among
them luggage_purse1), all under one prompt with a rare token. An attacker uses another
token: attack with `--config.data.prompt="a photo of a &m purse"`.

Hardware: not yet run on an accelerator. On two CPU cores in float32, with latents of
32x32, a step takes 20 s and 8.8 GB of memory, of which 3.3 GB are the frozen UNet and
0.9 GB the trained parameters with their moments (perf/memory.py).

Published (IMMA's code, GIFT's figures): the model, 512 pixels, batch 1, AdamW with
weight decay 1e-2 at constant rates of 5e-6 and 2e-5, 1,000 updates, the prompts. Ours:
beta, the bound and its cap, the safe data (MIMA generates 200 class pictures too), the
empty prompts. Result: not yet run.
"""

from ml_collections import ConfigDict

from gift_jax import train
from gift_jax.runtime import presets
from gift_jax.runtime.config import with_variant


def get_config(name: str = "") -> ConfigDict:
    c = presets.apply(train.get_config("gift"), presets.SD15, presets.OBJECT)
    return with_variant(c, name, smoke=presets.SD15_SMOKE)
