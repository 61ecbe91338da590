# SPDX-License-Identifier: Apache-2.0
"""GIFT on the embedded model against one forbidden concept.

    python -m gift_jax.train --config configs/emoji_gift.py --workdir runs/gift

Hardware: two CPU cores. Every constant is ours: the publication states none.
"""

from gift_jax.config import ConfigDict, variant


def get_config(name: str = "") -> ConfigDict:
    c = ConfigDict()
    c.name = "immunize"  # word in the progress line
    c.model = "emoji-sd"  # a diffusers folder; "emoji-sd" is the embedded one
    c.revision = ""  # of a hub id: branch, tag or commit
    c.variant = ""  # of the weight files: "" the plain ones, or fp16 ...
    c.resolution = 0  # pixels, square; 0: the model's own
    c.method = "gift"
    c.trainable = "cross_attention"  # see models/partition.py
    c.seed = 0
    c.steps = 300  # outer steps
    c.log_every = 20
    c.checkpoint_every = 100  # 0: only at the end
    c.keep = 2  # checkpoints
    c.compute_dtype = "float32"  # of the frozen part; what trains is float32
    c.cpu_devices = 1  # devices to make of a machine without accelerator

    c.gift = ConfigDict()
    c.gift.gradient = "first_order"  # or unrolled, joint
    c.gift.inner_steps = 1  # lower-level (prior) updates a step
    c.gift.outer_steps = 1  # upper-level (immunization) updates a step
    c.gift.beta = 0.02  # weight of representation noising; RepNoise's is 1e-3
    c.gift.bound = "hinge"  # of the ascent; or log, raw
    c.gift.cap = 20.0  # hinge: no gradient from an example whose loss is above this
    c.gift.noise_target = "standard"  # or matched
    c.gift.distance = "mse"  # or mmd
    c.gift.layers = ("transformer",)  # kinds of layers, see models/hooks.py
    c.gift.joint_weight = 1.0  # of the lower level, gradient=joint only

    c.lower = _optimizer(lr=1.2e-3)
    c.upper = _optimizer(lr=2.2e-3)
    c.upper.schedule = "cosine"  # so that the last steps mend more than they degrade
    c.harmful = _data(names=("bomb",), batch=12)
    c.safe = _data(names=("known-safe",), batch=24)
    c.safe.empty_prompts = 0.1  # as the model was trained; guidance needs them intact

    c.samples = ConfigDict()
    c.samples.prompts = ("a noto emoji of a bomb", "a noto emoji of a cat face")
    c.samples.num = 8  # pictures a prompt; 0: none
    c.samples.seed = 1
    c.samples.guidance = 3.0
    c.samples.steps = 25
    c.samples.batch = 16
    return variant(
        c,
        name,
        smoke={
            "steps": 2,
            "log_every": 1,
            "harmful.batch": 4,
            "safe.batch": 4,
            "safe.names": ("cat face",),
            "samples.num": 1,
            "samples.steps": 2,
        },
    )


def _optimizer(lr: float) -> ConfigDict:
    c = ConfigDict()
    c.lr = lr  # AdamW
    c.schedule = "constant"  # or cosine
    c.warmup_frac = 0.05  # of this level's updates
    c.b1 = 0.9
    c.b2 = 0.999
    c.weight_decay = 0.0
    c.clip_norm = 1.0  # global norm of the gradient; 0: no clipping
    return c


def _data(names: tuple, batch: int) -> ConfigDict:
    c = ConfigDict()
    c.names = names  # of the embedded set: things, or forbidden, known-safe, unseen ...
    c.styles = ("",)[:0]  # () uses all six
    c.template = "{a_style} emoji of {a_concept}"
    c.folder = ""  # instead of names: pictures under `prompt` or a metadata.csv, .jsonl
    c.caption_column = "text"  # of the folder's metadata
    c.tfds = ""  # instead: a prepared TFDS dataset, "name" or "name:version"
    c.tfds_data_dir = ""  # "": TFDS's own
    c.split = "train"
    c.image_key = "image"
    c.caption_key = ""  # a text feature
    c.label_key = ""  # or the class that fills `template`; or neither and `prompt`
    c.generate = 0  # instead: so many pictures that the model draws for `prompt`
    c.generate_seed = 0
    c.generate_steps = 25
    c.generate_guidance = 3.0  # 7.5 is usual for larger models
    c.prompt = ""  # of every picture; replaces a folder's captions
    c.limit = 0  # pictures, the first in the source's order; 0: all
    c.crop = "center"  # to a square; or random, none (squeezed)
    c.batch = batch  # pairs an update
    c.empty_prompts = 0.0  # share of pairs whose prompt is left empty
    c.copies = 4  # cached versions of each picture: itself, the rest augmented
    c.flip = 0.0  # probability of mirroring one that may be
    c.shift = 2  # pixels
    c.scale = 0.05  # fraction
    return c
