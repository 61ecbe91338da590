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
    c.revision = ""  # of a hub id: branch, tag or commit
    c.variant = ""  # of the weight files: "" the plain ones, or fp16 ...
    c.resolution = 0  # pixels, square; 0: the model's own
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
    c.data.names = ("bomb",)  # of the embedded set
    c.data.styles = ("",)[:0]  # () uses all six
    c.data.template = "{a_style} emoji of {a_concept}"
    c.data.folder = ""  # instead: pictures under `prompt` or a metadata.csv, .jsonl
    c.data.caption_column = "text"  # of the folder's metadata
    c.data.tfds = ""  # instead: a prepared TFDS dataset, "name" or "name:version"
    c.data.tfds_data_dir = ""  # "": TFDS's own
    c.data.split = "train"
    c.data.image_key = "image"
    c.data.caption_key = ""  # a text feature
    c.data.label_key = ""  # or the class that fills `template`; or neither and `prompt`
    c.data.generate = 0  # instead: so many pictures that the model draws for `prompt`
    c.data.generate_seed = 0
    c.data.generate_steps = 25
    c.data.generate_guidance = 3.0  # 7.5 is usual for larger models
    c.data.prompt = ""  # of every picture; replaces a folder's captions
    c.data.limit = 0  # pictures, the first in the source's order; 0: all
    c.data.crop = "center"  # to a square; or random, none (squeezed)
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
