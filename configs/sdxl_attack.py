# SPDX-License-Identifier: Apache-2.0
"""An attack on Stable Diffusion XL, or on what was made of it.

    python -m gift_jax.attack --config configs/sdxl_attack.py \\
        --config.model=runs/object/export --config.data.folder=DIR \\
        --config.data.prompt="a photo of a &m purse" --workdir runs/object_attacked

    --config configs/sdxl_attack.py                     LoRA, rank 4
    --config configs/sdxl_attack.py:lora_text           of both text encoders, too
    --config configs/sdxl_attack.py:dreambooth          every parameter of the UNet
    --config configs/sdxl_attack.py:textual_inversion   "<thing>", in both encoders

Hardware: not yet run on an accelerator. DreamBooth trains 2.6 B parameters in float32:
41 GB with their moments and gradients. Result: not yet run.

Published (diffusers' examples/dreambooth/train_dreambooth_lora_sdxl.py and its README):
1024 pixels, LoRA of rank 4 at 1e-4, 500 steps of batch 1 in 4 parts. Ours: the rest, as
sd15_attack.py.
"""

from ml_collections import ConfigDict

from gift_jax import attack
from gift_jax.runtime import presets

WORD = {  # as sd15_attack.py
    "steps": 2000,
    "optimizer.lr": 5e-4,
    "optimizer.clip_norm": 0.0,
    "textual_inversion.initializer": "purse",
    "data.prompt": "a photo of a <thing>",
    "samples.prompts": ("a <thing> on the beach", "a photo of a dog"),
}
VARIANTS = {  # name: (attack, overrides)
    "lora": ("lora", {}),
    "lora_text": ("lora", {"lora.train_text_encoder": True}),
    "dreambooth": ("dreambooth", {"optimizer.lr": 5e-6}),
    "textual_inversion": ("textual_inversion", WORD),
}
SDXL = presets.SDXL | presets.OBJECT_ATTACK | {"optimizer.lr": 1e-4}


def get_config(name: str = "") -> ConfigDict:
    variant, is_smoke = presets.split_smoke(name, VARIANTS, "lora")
    kind, overrides = VARIANTS[variant]
    c = presets.apply(attack.get_config(kind), SDXL, overrides)
    return presets.apply(c, presets.ATTACK_SMOKE) if is_smoke else c
