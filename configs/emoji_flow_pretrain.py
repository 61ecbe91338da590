# SPDX-License-Identifier: Apache-2.0
"""Makes emoji-flow, the Stable Diffusion 3 in miniature, of emoji-sd's VAE and text.

    python -m gift_jax.pretrain --config configs/emoji_flow_pretrain.py --workdir RUN

Hardware: two CPU cores. Cost and result: docs/lab/emoji_flow.md. Every constant is
ours. The width keeps the folder below 25 MB; queries and keys are normalized, as SD
3.5's are.
"""

from ml_collections import ConfigDict

from gift_jax.runtime.config import with_variant


def get_config(name: str = "") -> ConfigDict:
    c = ConfigDict()
    c.kind = "pretrain"  # the command that it is for
    c.seed = 0
    c.cpu_devices = 2  # to make of a machine without accelerator
    c.log_every = 50  # steps
    c.checkpoint_every = 250  # steps
    c.base = "emoji-sd"  # whose VAE, tokenizer and text encoder it has

    c.flow = ConfigDict()
    c.flow.steps = 4500
    c.flow.batch = 64
    c.flow.lr = 1e-3
    c.flow.weight_decay = 0.01
    c.flow.ema = 0.999
    c.flow.width = 160
    c.flow.heads = 5
    c.flow.layers = 8  # joint blocks
    c.flow.schedule_shift = 1.0  # none: 8x8 latents say little twice
    c.flow.variants = 8  # cached versions of each image
    c.flow.prompt_dropout = 0.1  # probability, for classifier-free guidance
    c.flow.shift = 2  # pixels
    c.flow.scale = 0.05  # fraction

    c.quality = ConfigDict()  # of the result, measured at the end
    c.quality.seed = 0
    c.quality.guidance = 3.0
    c.quality.steps = 25
    c.quality.limit = 0  # samples; 0: every known concept in every style

    smoke = {
        "cpu_devices": 1,
        "flow.steps": 2,
        "flow.batch": 8,
        "flow.width": 32,
        "flow.heads": 2,
        "flow.layers": 2,
        "flow.variants": 2,
        "quality.steps": 2,
        "quality.limit": 4,
    }
    return with_variant(c, name, smoke=smoke)
