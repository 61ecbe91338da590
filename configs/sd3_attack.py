# SPDX-License-Identifier: Apache-2.0
"""An attack on Stable Diffusion 3.5 medium, or on what was made of it.

    python -m gift_jax.attack --config configs/sd3_attack.py \\
        --config.model=runs/object/export --config.data.folder=DIR \\
        --config.data.prompt="a photo of a &m purse" --workdir runs/object_attacked

    --config configs/sd3_attack.py               LoRA, rank 4, of image and text
    --config configs/sd3_attack.py:lora_text     of both CLIPs, too
    --config configs/sd3_attack.py:dreambooth    every parameter of the transformer

Textual inversion has no variant: diffusers' pipeline loads none.

Hardware: not yet run on an accelerator. DreamBooth trains 2.2 B parameters in float32:
36 GB with their moments and gradients. Result: not yet run.

Published (diffusers' examples/dreambooth/train_dreambooth_lora_sd3.py,
train_dreambooth_sd3.py and README_sd3.md, for SD 3 medium): 500 steps of batch 1 in 4
parts at a constant rate; LoRA of rank 4 at 4e-4 and 512 pixels, of the joint
attention's eight projections; DreamBooth at 1e-4 and 1024 pixels. Ours: 1024 pixels for
both, and the rest, as sd15_attack.py.
"""

from ml_collections import ConfigDict

from gift_jax import attack
from gift_jax.attacks import lora
from gift_jax.runtime import presets

VARIANTS = {  # name: (attack, overrides)
    "lora": ("lora", {"optimizer.lr": 4e-4, "lora.targets": lora.TARGETS}),
    "dreambooth": ("dreambooth", {"optimizer.lr": 1e-4}),
}
VARIANTS["lora_text"] = (
    "lora",
    VARIANTS["lora"][1] | {"lora.train_text_encoder": True},
)
SD35 = presets.SD35 | presets.OBJECT_ATTACK
SMOKE = presets.ATTACK_SMOKE | {"model": "emoji-flow"}


def get_config(name: str = "") -> ConfigDict:
    variant, is_smoke = presets.split_smoke(name, VARIANTS, "lora")
    kind, overrides = VARIANTS[variant]
    c = presets.apply(attack.get_config(kind), SD35, overrides)
    return presets.apply(c, SMOKE) if is_smoke else c
