# SPDX-License-Identifier: Apache-2.0
"""A tiny random FLUX.1: its configs, and its folder."""

import functools

from tiny_model import TINY_TEXT, random_params
from tiny_sd3 import TINY_SD3

from gift_jax.models import flux
from gift_jax.models.flux import architectures
from gift_jax.models.mmdit.random_weights import write_t5_tokenizer
from gift_jax.models.sd import random_weights

_TRANSFORMER = {
    "attention_head_dim": 16,
    "in_channels": 64,
    "axes_dims_rope": [4, 4, 8],
    "joint_attention_dim": 96,
    "num_attention_heads": 2,
    "num_layers": 2,
    "num_single_layers": 2,
    "pooled_projection_dim": 32,
}
NAMES = {"dev": architectures.DEV, "schnell": architectures.SCHNELL}


def configs(name="dev"):
    """Returns the tiny configs of a name of `NAMES`; T5's is Stable Diffusion 3's."""
    whole = NAMES[name]
    factors = {k: whole["vae"][k] for k in ("scaling_factor", "shift_factor")}
    return {
        "transformer": whole["transformer"] | _TRANSFORMER,
        "vae": TINY_SD3["vae"] | factors,
        "text_encoder": TINY_TEXT | {"architectures": ["CLIPTextModel"]},
        "text_encoder_2": TINY_SD3["text_encoder_3"] | {"num_layers": 1},
        "scheduler": whole["scheduler"],
    }


def write_tiny_flux(directory, name="dev"):
    """Writes one of a block of each kind as a diffusers folder; returns it."""
    parts = configs(name)
    parts["transformer"] |= {"num_layers": 1, "num_single_layers": 1}
    for component, kind in flux.KIND_OF.items():
        random_weights.write_component(directory / component, kind, parts[component])
    random_weights.write_tokenizer(directory / "tokenizer", 514, 16)
    write_t5_tokenizer(directory / "tokenizer_2")
    scheduler = parts["scheduler"]
    random_weights.write_json(
        directory / "scheduler" / "scheduler_config.json", scheduler
    )
    index = {
        "_class_name": "FluxPipeline",
        "_diffusers_version": "0.35.0",
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    random_weights.write_json(directory / "model_index.json", index)
    return directory


@functools.cache
def build(name="dev"):
    """Returns (module, random parameters) of a name of `NAMES`."""
    module = flux.build_transformer(configs(name)["transformer"])
    return module, random_params(module, 0)
