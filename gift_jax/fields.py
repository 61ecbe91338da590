# SPDX-License-Identifier: Apache-2.0
"""Every field that an immunization or an attack can be given, declared once.

A file in configs/ starts from `gift()` or `attack()` and sets what it changes. The
values here are neutral ones; constants that matter are the config files', with their
origin.
"""

from ml_collections import ConfigDict


def gift() -> ConfigDict:
    """Returns the config of `python -m gift_jax.train`, every method's fields in it."""
    c = _job("immunize", seed=0)
    c.method = "gift"  # or maximize_prior, maximize, imma, esd, uce
    c.trainable = "cross_attention"  # see models/trainable.py
    c.gift = ConfigDict()
    c.gift.gradient = "first_order"  # or unrolled, joint
    c.gift.inner_steps = 1  # lower-level (prior) updates a step
    c.gift.outer_steps = 1  # upper-level (immunization) updates a step
    c.gift.beta = 1e-3  # weight of representation noising; RepNoise's
    c.gift.bound = "hinge"  # of the ascent; or log, raw
    c.gift.cap = 20.0  # hinge: no gradient from an example whose loss is above this
    c.gift.noise_target = "standard"  # or matched
    c.gift.distance = "mse"  # or mmd
    c.gift.layers = ("transformer",)  # kinds of layers, see models/sd/unet.py
    c.gift.preserve = "data"  # or model: what it predicted before for the safe pairs
    c.gift.safe_limit = 0.0  # of the lower loss: above it the upper level fades; or 0
    c.gift.joint_weight = 1.0  # of the lower level, gradient=joint only
    c.adversary = ConfigDict()  # fine-tuning simulated inside the step of gift
    c.adversary.kinds = ("",)[:0]  # full, lora or both; (): none, as published
    c.adversary.steps_min = 0  # the number of updates is drawn anew for every step
    c.adversary.steps_max = 4
    c.adversary.lr_min = 1e-4  # Adam's rate, log-uniform
    c.adversary.lr_max = 1e-3
    c.adversary.lora_lr_min = 1e-3  # the same of lora
    c.adversary.lora_lr_max = 1e-2
    c.adversary.rank = 8  # of lora
    c.adversary.alpha = 8.0
    c.adversary.unrolled = False  # gradients through the updates, or at their end
    c.adversary.horizon = 0  # full, first_order: steps that an attack goes on over
    c.adversary.safe_weight = 1.0  # of "safe data stays learnable", in the lower level
    c.imma = ConfigDict()
    c.imma.lower = "dreambooth"  # or lora: what the lower level trains
    c.imma.inner_steps = 1
    c.imma.outer_steps = 1
    c.imma.bound = "raw"  # as published: no limit
    c.imma.cap = 0.0
    c.imma.rank = 4
    c.imma.alpha = 4.0
    c.esd = ConfigDict()
    c.esd.eta = 1.0  # how far past the unconditional prediction
    c.esd.source = "frozen"  # of the latents; or current, the model being trained
    c.esd.steps = 50  # of the DDIM trajectory
    c.esd.guidance = 3.0  # of the trajectory
    c.esd.timestep = "interval"  # or row, as the authors' later code
    c.esd.trajectories = 32  # source=frozen: walked once, over all prompts
    c.uce = ConfigDict()
    c.uce.lamb = 0.5  # weight of the original projections
    c.uce.erase = 1.0
    c.uce.preserve = 1.0  # of the safe pairs' prompts
    c.uce.guide = ""  # what takes an erased prompt's place; may name its {style}
    c.uce.states = "last"  # text states of a prompt; or tail: all that follow too
    c.lower = optimizer()
    c.upper = optimizer()
    c.post_finetune = optimizer()  # on safe pairs, after the method
    c.post_finetune.steps = 0  # 0: none
    c.harmful = pairs()
    c.safe = pairs()
    return c.lock()


def emoji() -> ConfigDict:
    """Returns gift() on the embedded model: one harmful thing, many safe ones."""
    c = gift()
    c.steps = 300
    c.harmful.update(names=("bomb",), batch=12)
    c.safe.update(names=("known-safe",), batch=24)
    c.safe.prompt_dropout = 0.1  # as the model was trained; guidance needs them intact
    for group in (c.harmful, c.safe):
        group.update(augmented_copies=4, shift=2, scale=0.05)
        group.generation.update(steps=25, guidance=3.0)  # emoji-sd's
        group.nonce_template = "{a_style} emoji of {nonce}"
    c.samples.prompts = ("a noto emoji of a bomb", "a noto emoji of a cat face")
    c.samples.update(guidance=3.0, batch=16)
    return c


EMOJI_SMOKE = {
    "steps": 2,
    "log_every": 1,
    "harmful.batch": 4,
    "safe.batch": 4,
    "safe.names": ("cat face",),
    "samples.num": 1,
    "samples.steps": 2,
    "post_finetune.steps": 0,
}


def sd15() -> ConfigDict:
    """Returns gift() with what the experiments on Stable Diffusion 1.5 share.

    From the published code of IMMA (ECCV 2024), whose settings GIFT follows where it
    says: 512 pixels, batch 1, AdamW at a constant rate, 1,000 steps. GIFT's own rates,
    beta and bound are not published: the ones here are ours, and not yet run.
    """
    c = gift()
    c.model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    c.resolution = 512
    c.steps = 500  # of one lower and one upper update: 1,000 updates
    c.lower.lr = 5e-6  # IMMA's inner rate for DreamBooth
    c.upper.lr = 2e-5  # IMMA's outer rate
    c.gift.cap = 4.0  # ours; an untrained predictor's loss is near 1
    c.safe.prompt_dropout = 0.1  # ours; guidance needs them intact
    c.harmful.flip = c.safe.flip = 1.0  # of every copy after the first: both mirror
    c.harmful.augmented_copies = c.safe.augmented_copies = (
        2  # images of each picture are cached
    )
    c.samples.num = 4
    return c


def smoke(**others) -> dict:
    """Returns the overrides of a variant that shows in a minute that a config works.

    The embedded model stands in for SD 1.5 and draws its own pictures.
    """
    few = {"num_generated": 2, "generation.steps": 2, "folder": ""}
    few["prompt"] = "a noto emoji"
    groups = {f"{g}.{k}": v for g in ("harmful", "safe") for k, v in few.items()}
    job = {"model": "emoji-sd", "resolution": 0, "steps": 2, "log_every": 1}
    return groups | job | {"samples.num": 1, "samples.steps": 2} | others


def attack() -> ConfigDict:
    """Returns the config of `python -m gift_jax.attack`."""
    c = _job("attack", seed=100)  # not the defender's
    c.attack = "lora"  # or dreambooth, textual_inversion
    c.lora = ConfigDict()
    c.lora.rank = 4
    c.lora.alpha = 4.0  # the update is scaled by alpha / rank
    c.lora.targets = ("to_q", "to_k", "to_v", "to_out_0")
    c.dreambooth = ConfigDict()  # trains the whole UNet
    c.dreambooth.prior_weight = 0.0  # of the loss on `prior`; 0: not read
    c.dreambooth.train_text_encoder = False
    c.inversion = ConfigDict()  # textual_inversion: trains new words alone
    c.inversion.token = "<thing>"  # new to the model; the prompts have it
    c.inversion.initializer = "thing"  # a word that is one token: where it starts
    c.inversion.vectors = 1  # embeddings that the token stands for
    c.optimizer = optimizer()
    c.data = pairs()
    c.prior = pairs()  # pictures of the class: dreambooth.prior_weight
    c.samples.at = ("",)[:0]  # steps after which they are drawn too
    return c.lock()


def evaluate() -> ConfigDict:
    """Returns the config of `python -m gift_jax.evaluate`."""
    c = _job("evaluate", seed=0)
    for field in (
        *("steps", "log_every", "checkpoint_every", "keep"),
        *("mesh", "shard_frozen", "accumulate", "processes", "remat"),
    ):
        del c[field]
    c.samples.num = 25  # uncurated, of each prompt
    c.references = pairs()  # real pictures of what the prompts ask for; or no source
    c.training = pairs()  # what the model was last trained on; or no source
    c.right = ("",)[:0]  # names a classifier may say; (): the names of the references
    c.trait = "thing"  # or style: what those names are of
    c.panel = panel()
    return c.lock()


def panel() -> ConfigDict:
    """Returns the fields that say how pictures are measured, see metrics/suite.py."""
    c = ConfigDict()
    c.metrics = ("recognition",)
    c.backbones = ("judge",)  # or folders, or hub ids, of CLIP, DINO, DINOv2
    c.protocols = ("standard",)  # or imma-64px, or both side by side
    # what names things: the judge of the embedded world, or a folder, or hub id, of an
    # ImageNet ResNet or ViT (microsoft/resnet-50), whose labels go by any synonym
    c.classifier = "judge"
    c.lpips = ""  # file with LPIPS's weights, or the folder that it is in
    c.nudity_threshold = 0.45
    return c


def _job(name: str, seed: int) -> ConfigDict:
    c = ConfigDict()
    c.name = name  # word in the progress line
    c.model = "emoji-sd"  # or a diffusers folder, or a hub id
    c.revision = ""  # of a hub id: branch, tag or commit
    c.variant = ""  # of the weight files: "" the plain ones, or fp16 ...
    c.resolution = 0  # pixels, square; 0: the model's own
    c.seed = seed
    c.steps = 1000
    c.log_every = 20
    c.checkpoint_every = 100  # 0: only at the end
    c.keep = 2  # checkpoints
    c.compute_dtype = "float32"  # of the frozen part; what trains is float32
    c.cpu_devices = 0  # to make of a machine without accelerator; 0: one a core
    c.mesh = ConfigDict()  # devices along each axis; 0: all that the others leave
    c.mesh.update(data=0, fsdp=1, tensor=1)
    c.attention = "auto"  # or plain, chunked, flash (TPU), cudnn (GPU)
    c.remat = "none"  # what is computed again for the gradient: none, block, full
    c.shard_frozen = False  # divide over fsdp what does not train, too
    c.accumulate = 1  # parts of a batch, computed one after the other
    c.processes = ConfigDict()  # of several, where the environment does not say it
    c.processes.update(coordinator="", count=0, index=-1)  # "HOST:PORT" of process 0
    c.samples = ConfigDict()
    c.samples.prompts = ("",)[:0]
    c.samples.num = 8  # pictures a prompt; 0: none
    c.samples.seed = seed + 1
    c.samples.guidance = 7.5
    c.samples.steps = 25
    c.samples.batch = 4  # pictures drawn at once
    return c


def optimizer() -> ConfigDict:
    """Returns the fields of one AdamW with clipping and a schedule."""
    c = ConfigDict()
    c.lr = 1e-5
    c.schedule = "constant"  # or cosine
    c.warmup_frac = 0.0  # of this optimizer's updates
    c.b1 = 0.9
    c.b2 = 0.999
    c.weight_decay = 1e-2
    c.clip_norm = 1.0  # global norm of the gradient; 0: no clipping
    return c


def pairs() -> ConfigDict:
    """Returns the fields of a group of (picture, prompt) pairs, without a source.

    Exactly one of names, folder, tfds and num_generated is to be set.
    """
    c = ConfigDict()
    c.names = ("",)[:0]  # of the embedded set: things, or harmful, known-safe, unseen
    c.styles = ("",)[:0]  # of the embedded set; () uses all six
    c.template = "{a_style} emoji of {a_concept}"
    c.folder = ""  # pictures under `prompt`, or with a metadata.csv or .jsonl
    c.caption_column = "text"  # of the folder's metadata
    c.tfds = ""  # a prepared TFDS dataset, "name" or "name:version"
    c.tfds_data_dir = ""  # "": TFDS's own
    c.split = "train"
    c.image_key = "image"
    c.caption_key = ""  # a text feature
    c.label_key = ""  # or the class that fills `template`; or neither and `prompt`
    c.num_generated = 0  # so many pictures that the model draws for `prompt`, cached
    c.generation = ConfigDict()
    c.generation.seed = 0
    c.generation.steps = 30
    c.generation.guidance = 7.5
    c.prompt = ""  # of every picture; replaces a folder's captions
    c.limit = 0  # pictures, the first in the source's order; 0: all
    c.crop = "center"  # to a square; or random, none (squeezed)
    c.batch = 1  # pairs an update
    c.prompt_dropout = 0.0  # share of pairs whose prompt is left empty
    c.nonce_prompts = 0.0  # share of pairs called by made-up words, as "sks"
    c.nonce_template = "a photo of {nonce}"  # with names maybe {a_style} too
    c.augmented_copies = (
        1  # cached versions of each picture: itself, the rest augmented
    )
    c.flip = 0.0  # probability of mirroring one that may be
    c.shift = 0  # pixels
    c.scale = 0.0  # fraction
    return c
