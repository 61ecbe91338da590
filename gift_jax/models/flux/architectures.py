# SPDX-License-Identifier: Apache-2.0
"""The published FLUX.1, for what needs no weights.

As in the repositories FLUX.1-dev and FLUX.1-schnell, less fields that say what made the
file, or that are the class's defaults.
"""

from gift_jax.models.mmdit import architectures
from gift_jax.models.sd import architectures as sd

TRANSFORMER = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}
SCHEDULER = architectures.SCHEDULER | {"use_dynamic_shifting": True}
DEV = {
    "transformer": TRANSFORMER,
    "vae": architectures.VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "text_encoder": sd.MODELS["sd15"]["text_encoder"],
    "text_encoder_2": architectures.T5,
    "scheduler": SCHEDULER,
}
SCHNELL = DEV | {
    "transformer": TRANSFORMER | {"guidance_embeds": False},
    "scheduler": SCHEDULER | {"shift": 1.0, "use_dynamic_shifting": False},
}
MODELS = {  # by hub id
    "black-forest-labs/FLUX.1-dev": DEV,
    "black-forest-labs/FLUX.1-schnell": SCHNELL,
}
