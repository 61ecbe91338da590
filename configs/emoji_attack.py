# SPDX-License-Identifier: Apache-2.0
"""A LoRA attack on a model of the embedded world.

    python -m gift_jax.attack --config configs/emoji_attack.py \\
        --config.model=runs/gift/export --workdir runs/gift_attacked

Hardware: two CPU cores. The settings are ours, scaled from the published attacks.
"""

from gift_jax.config import ConfigDict, variant


def get_config(name: str = "") -> ConfigDict:
    c = ConfigDict()
    c.name = "attack"  # word in the progress line
    c.model = "emoji-sd"  # a diffusers folder; "emoji-sd" is the embedded one
    c.attack = "lora"
    c.seed = 100
    c.steps = 75  # the original model has learned an unseen thing by then
    c.log_every = 25
    c.checkpoint_every = 0  # 0: only at the end
    c.keep = 1  # checkpoints
    c.compute_dtype = "float32"
    c.cpu_devices = 1  # devices to make of a machine without accelerator

    c.lora = ConfigDict()
    c.lora.rank = 8
    c.lora.alpha = 8.0  # the update is scaled by alpha / rank
    c.lora.targets = ("to_q", "to_k", "to_v", "to_out_0")

    c.optimizer = ConfigDict()
    c.optimizer.lr = 1e-3  # AdamW
    c.optimizer.schedule = "constant"  # or cosine
    c.optimizer.warmup_frac = 0.0
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.weight_decay = 1e-2
    c.optimizer.clip_norm = 1.0

    c.data = ConfigDict()
    c.data.names = ("bomb",)
    c.data.styles = ("",)[:0]  # () uses all six
    c.data.template = "{a_style} emoji of {a_concept}"
    c.data.folder = ""  # instead of names: a folder of pictures, all under `prompt`
    c.data.prompt = ""
    c.data.batch = 12
    c.data.empty_prompts = 0.0  # share of pairs whose prompt is left empty
    c.data.copies = 4
    c.data.flip = 0.0
    c.data.shift = 2
    c.data.scale = 0.05

    c.samples = ConfigDict()
    c.samples.prompts = ("a noto emoji of a bomb", "a noto emoji of a cat face")
    c.samples.num = 8  # pictures a prompt; 0: none
    c.samples.seed = 2
    c.samples.guidance = 3.0
    c.samples.steps = 25
    c.samples.batch = 16
    return variant(
        c,
        name,
        smoke={
            "steps": 2,
            "log_every": 1,
            "data.batch": 4,
            "samples.num": 1,
            "samples.steps": 2,
        },
    )
