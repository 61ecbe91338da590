# SPDX-License-Identifier: Apache-2.0
"""A tiny random Stable Diffusion 3: its configs, and its folder."""

import functools

import numpy as np
from tiny_model import TINY_TEXT, random_params

from gift_jax.models import exports, mmdit
from gift_jax.models.mmdit import architectures, random_weights
from gift_jax.models.sd.architectures import END

_CLIP = TINY_TEXT | {"architectures": ["CLIPTextModelWithProjection"]}
# What differs in everything: image and text, both CLIPs, T5's heads and its width.
TINY_SD3 = {
    "transformer": architectures.TRANSFORMER
    | {
        "attention_head_dim": 8,
        "caption_projection_dim": 32,
        "joint_attention_dim": 96,
        "num_attention_heads": 4,
        "num_layers": 3,
        "pooled_projection_dim": 32 + 24,
        "pos_embed_max_size": 10,
        "sample_size": 8,
    },
    "vae": architectures.VAE
    | {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "layers_per_block": 1,
        "sample_size": 16,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    },
    "text_encoder": _CLIP | {"hidden_act": "quick_gelu"},
    "text_encoder_2": _CLIP
    | {
        "hidden_act": "gelu",
        "hidden_size": 48,
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "projection_dim": 24,
    },
    "text_encoder_3": architectures.T5
    | {
        "d_ff": 80,
        "d_kv": 8,
        "d_model": 96,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "num_layers": 3,
        "relative_attention_max_distance": 20,
        "relative_attention_num_buckets": 16,
        "vocab_size": 300,
    },
    "scheduler": architectures.SCHEDULER,
    "pad_token": END,
    "pad_token_2": "!",
}
TRANSFORMERS = {  # of the published ones: what the config.json says beside sizes
    "sd3": {},
    "sd3.5-large": {"qk_norm": "rms_norm"},
    "sd3.5-medium": {"qk_norm": "rms_norm", "dual_attention_layers": [0, 1]},
}


def configs(name="sd3.5-medium", t5=True):
    """Returns the tiny configs of a name of `TRANSFORMERS`, with T5 or without."""
    whole = {kind: TINY_SD3[kind] for kind in TINY_SD3 if t5 or kind[-2:] != "_3"}
    return whole | {"transformer": TINY_SD3["transformer"] | TRANSFORMERS[name]}


def write_tiny_sd3(directory, name="sd3.5-medium", t5=True):
    """Writes a tiny random Stable Diffusion 3 as a diffusers folder; returns it."""
    return random_weights.write(directory, configs(name, t5))


def transformer_inputs(rng, pooled):
    """Latents that are not square, timesteps of a flow, states and pooled text."""
    z = rng.normal(size=(2, 16, 8, 12)).astype(np.float32)
    t = np.float32([3.25, 987.5])
    states = rng.normal(size=(2, 7, 96)).astype(np.float32)
    return z, t, states, rng.normal(size=(2, pooled)).astype(np.float32)


def torch_transformer(cls, config, params, folder):
    """Returns PyTorch's of a class, read from the files written here."""
    import diffusers

    exports.save_model_folder(folder, config, params)
    return getattr(diffusers, cls).from_pretrained(str(folder)).eval()


@functools.cache
def build(name):
    """Returns (module, random parameters) of a name of `TRANSFORMERS`."""
    module = mmdit.build_transformer(configs(name)["transformer"])
    return module, random_params(module, 0)
