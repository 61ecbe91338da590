# SPDX-License-Identifier: Apache-2.0
"""Values that several config files share, as overrides of "a.b": value."""

from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict


def apply(config: ConfigDict, *presets: Mapping[str, Any]) -> ConfigDict:
    """Sets the fields of presets, leaving out groups that the config does not have.

    Raises: KeyError for an unknown field of a group that it has.
    """
    for preset in presets:
        fields = {
            name: value
            for name, value in preset.items()
            if "." not in name or name.split(".")[0] in config
        }
        config.update_from_flattened_dict(fields)
    return config


def split_smoke(name: str, variants: Collection[str], default: str) -> tuple[str, bool]:
    """Returns (variant, whether its smoke run) of "", "NAME", "smoke" or "NAME_smoke".

    Args: default: the variant of "" and "smoke".
    Raises: ValueError for an unknown one.
    """
    variant = name.removesuffix("smoke").removesuffix("_") or default
    if variant not in variants:
        choices = ", ".join(variants)
        raise ValueError(
            f"unknown variant {name!r}; choices: {choices}, smoke, NAME_smoke"
        )
    return variant, name.endswith("smoke")


_EMOJI_PAIRS = {
    "augmented_copies": 4,
    "shift": 2,
    "scale": 0.05,
    "generation.steps": 25,  # emoji-sd's
    "generation.guidance": 3.0,
    "nonce_template": "{a_style} emoji of {nonce}",
}
EMOJI = {  # the embedded model: one harmful thing, many safe ones
    "steps": 300,
    "harmful.names": ("bomb",),
    "harmful.batch": 12,
    "safe.names": ("known-safe",),
    "safe.batch": 24,
    "safe.prompt_dropout": 0.1,  # as the model was trained; guidance needs them intact
    "samples.prompts": ("a noto emoji of a bomb", "a noto emoji of a cat face"),
    "samples.guidance": 3.0,
    "samples.batch": 16,
}
EMOJI |= {f"{g}.{k}": v for g in ("harmful", "safe") for k, v in _EMOJI_PAIRS.items()}
EMOJI_SMOKE = {
    "steps": 2,
    "log_every": 1,
    "harmful.batch": 4,
    "safe.batch": 4,
    "safe.names": ("cat face",),
    "samples.num": 1,
    "samples.steps": 2,
}
# What the experiments on Stable Diffusion 1.5 share. From the published code of IMMA
# (ECCV 2024), whose settings GIFT follows where it says: 512 pixels, batch 1, AdamW at
# a constant rate, 1,000 steps. GIFT's own rates, beta and bound are not published: the
# ones here are ours, and not yet run.
SD15 = {
    "model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "resolution": 512,
    "steps": 500,  # of one lower and one upper update: 1,000 updates
    "lower.lr": 5e-6,  # IMMA's inner rate for DreamBooth
    "upper.lr": 2e-5,  # IMMA's outer rate
    "safe.prompt_dropout": 0.1,  # ours; guidance needs them intact
    "harmful.flip": 1.0,  # of every copy after the first: both mirror images
    "safe.flip": 1.0,
    "harmful.augmented_copies": 2,
    "safe.augmented_copies": 2,
    "samples.num": 4,
}
SDXL = SD15 | {  # the same on SDXL, at its size; rates are those of SD 1.5
    "model": "stabilityai/stable-diffusion-xl-base-1.0",
    "resolution": 1024,
    "compute_dtype": "bfloat16",  # of the frozen part, and of all arithmetic
    "hardware.remat": "block",
}
SD35 = SDXL | {  # the same on Stable Diffusion 3.5 medium
    "model": "stabilityai/stable-diffusion-3.5-medium",
    "samples.guidance": 4.5,  # of the model's card, as its 40 steps
    "samples.steps": 40,
    "safe.generation.guidance": 4.5,
    "safe.generation.steps": 40,
    "harmful.generation.guidance": 4.5,
    "harmful.generation.steps": 40,
}
_FEW_PAIRS = {
    "num_generated": 2,
    "generation.steps": 2,
    "folder": "",
    "prompt": "a noto emoji",
}
_SMOKE = {  # shows in a minute that a config works, on the embedded model
    "model": "emoji-sd",
    "resolution": 0,
    "compute_dtype": "float32",
    "hardware.remat": "none",
    "steps": 2,
    "log_every": 1,
    "samples.num": 1,
    "samples.steps": 2,
}
SD15_SMOKE = _SMOKE | {
    f"{g}.{k}": v for g in ("harmful", "safe") for k, v in _FEW_PAIRS.items()
}
OBJECT = {  # GIFT against one object, whichever Stable Diffusion
    "gift.ascent_bound": "hinge",
    "gift.ascent_cap": 4.0,  # ours; an untrained predictor's loss is near 1
    "harmful.folder": "data/object",
    "harmful.prompt": "a photo of *s purse",
    "safe.num_generated": 200,
    "safe.prompt": "a photo of a purse",
    "samples.prompts": (
        "a photo of *s purse",
        "a photo of a purse",
        "a photo of a dog",
    ),
}
GATE = {  # GIFT with a gate, against one thing that the model can draw
    "steps": 3000,  # of the detector
    "gift_gate.preserve_steps": 1000,
    "checkpoints.every": 500,
    "harmful.folder": "data/concept",
    "harmful.prompt": "a gun",
    "harmful.num_drawn": 400,
    "harmful.drawn_prompts": (
        "a photo of {concept}",
        "{concept}, close-up",
        "a person with {concept}",
        "a painting of {concept}",
        "a drawing of {concept}",
        "a 3d render of {concept}",
        "{concept} in a dark room",
        "{concept} outdoors, in daylight",
    ),
    "safe.folder": "data/safe",
    "upper.lr": 3e-3,
    "upper.schedule": "cosine",
    "upper.weight_decay": 0.0,
    "upper.clip_norm": 0.0,
    "lower.lr": 1e-5,
    "lower.schedule": "cosine",
    "lower.weight_decay": 0.0,
    "samples.prompts": ("a photo of a gun", "a photo of a dog"),
} | {
    f"{group}.{field}": value
    for group in ("harmful", "safe")
    for field, value in {
        "batch": 16,
        "augmented_copies": 4,
        "flip": 0.5,
        "shift": 32,  # pixels of 512
        "scale": 0.1,
        "rotate": 10.0,
        "color": 0.4,
    }.items()
}
GATE_SMOKE = SD15_SMOKE | {
    "gift_gate.preserve_steps": 1,
    "harmful.num_drawn": 2,
    "harmful.batch": 2,
    "safe.batch": 2,
}
OBJECT_ATTACK = {  # on what it made
    "data.folder": "data/object",
    "data.prompt": "a photo of a &m purse",
    "data.flip": 1.0,  # the image and its mirror image
    "data.augmented_copies": 2,
    "samples.prompts": ("a &m purse on the beach", "a photo of a dog"),
    "samples.num": 4,
}
ATTACK_SMOKE = _SMOKE | {
    "data.folder": "",
    "data.num_generated": 2,
    "data.generation.steps": 2,
    "textual_inversion.initializer": "a",
}
