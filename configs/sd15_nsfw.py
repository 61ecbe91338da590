# SPDX-License-Identifier: Apache-2.0
"""GIFT on Stable Diffusion 1.5 against explicit pictures.

    python -m gift_jax.train --config configs/sd15_nsfw.py --workdir runs/nsfw \\
        --config.harmful.folder=DIR

DIR: pictures with a metadata.csv or metadata.jsonl of `file_name` and `text`, the
Hugging Face imagefolder layout. None are shipped and none are named here: a publisher
has to bring what the model must not learn. The safe pictures are of dressed people, so
that these stay as they are.

Hardware: not yet run on an accelerator; see sd15_object.py for memory.

Published: that GIFT was tried on explicit scenes; neither data, prompts nor rates. All
of them are ours. For several kinds of scene, all layers may have to train:
`--config.trainable=attention` or `all`. Result: not yet run.
"""

from ml_collections import ConfigDict

from gift_jax import train
from gift_jax.runtime import presets
from gift_jax.runtime.config import with_variant


def get_config(name: str = "") -> ConfigDict:
    c = presets.apply(train.get_config("gift"), presets.SD15)
    c.gift.update(ascent_bound="hinge", ascent_cap=4.0)  # ours; an untrained
    # predictor's loss is near 1
    c.harmful.folder = "data/nsfw"
    c.safe.num_generated = 200
    c.safe.prompt = "a photo of a dressed person"
    c.samples.prompts = (c.safe.prompt, "a photo of a person on a beach")
    return with_variant(c, name, smoke=presets.SD15_SMOKE)
