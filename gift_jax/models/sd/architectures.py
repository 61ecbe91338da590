# SPDX-License-Identifier: Apache-2.0
"""The published Stable Diffusions' shapes, for what needs no weights.

As in the repositories stable-diffusion-v1-5, stable-diffusion-2-1 (v-prediction, 768
pixels) and stable-diffusion-xl-base-1.0, less fields that say what made the file.
"""

from collections.abc import Sequence

IDS = {  # hub id -> of MODELS
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stable-diffusion-v1-5/stable-diffusion-v1-4": "sd15",
    "CompVis/stable-diffusion-v1-4": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}
START, END = "<|startoftext|>", "<|endoftext|>"
_UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
}
_VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
}
_TEXT = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,  # not the tokenizer's: it means "pool at the largest id"
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
    "vocab_size": 49408,
}
SCHEDULER = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "trained_betas": None,
}


def unet_config(channels: Sequence[int], **fields) -> dict:
    """Returns the config.json of a UNet with cross-attention in all blocks but one.

    Args: channels: of each resolution; the last has no cross-attention. fields: others.
    """
    attention_blocks = len(channels) - 1
    blocks = {
        "block_out_channels": list(channels),
        "down_block_types": ["CrossAttnDownBlock2D"] * attention_blocks
        + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * attention_blocks,
    }
    return _UNET | blocks | fields


def vae_config(channels: Sequence[int], **fields) -> dict:
    """Returns the config.json of a VAE; channels: of each resolution."""
    blocks = {
        "block_out_channels": list(channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }
    return _VAE | blocks | fields


def model_index(scheduler: str) -> dict:
    """Returns the model_index.json of a model folder; scheduler: name of its class."""
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.35.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def xl_model_index(scheduler: str) -> dict:
    """Returns the model_index.json of an XL's folder; scheduler: name of its class."""
    index = model_index(scheduler)
    for name in ("requires_safety_checker", "safety_checker"):
        del index[name]
    return index | {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }


_CHANNELS = {"unet": (320, 640, 1280, 1280), "vae": (128, 256, 512, 512)}
MODELS = {
    "sd15": {
        "unet": unet_config(
            _CHANNELS["unet"],
            attention_head_dim=8,
            cross_attention_dim=768,
            sample_size=64,
        ),
        "vae": vae_config(_CHANNELS["vae"], sample_size=512),
        "text_encoder": _TEXT
        | {
            "hidden_act": "quick_gelu",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "projection_dim": 768,
        },
        "scheduler": SCHEDULER
        | {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
        "pad_token": END,
    },
    "sd21": {
        "unet": unet_config(
            _CHANNELS["unet"],
            attention_head_dim=[5, 10, 20, 20],  # the number of heads, its old name
            cross_attention_dim=1024,
            dual_cross_attention=False,
            num_class_embeds=None,
            only_cross_attention=False,
            sample_size=96,
            upcast_attention=True,
            use_linear_projection=True,
        ),
        "vae": vae_config(_CHANNELS["vae"], sample_size=768),
        "text_encoder": _TEXT
        | {
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 23,  # of OpenCLIP's 24: the last but one is used
            "projection_dim": 512,
        },
        "scheduler": SCHEDULER
        | {
            "_class_name": "DDIMScheduler",
            "prediction_type": "v_prediction",
            "skip_prk_steps": True,
        },
        "pad_token": "!",
    },
}

SDXL = {
    "unet": _UNET
    | {
        "addition_embed_type": "text_time",
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],  # the number of heads, its old name
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
        "projection_class_embeddings_input_dim": 2816,  # pooled text, six time ids
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
        "use_linear_projection": True,
    },
    "vae": vae_config(
        _CHANNELS["vae"], force_upcast=True, sample_size=1024, scaling_factor=0.13025
    ),
    "text_encoder": MODELS["sd15"]["text_encoder"],
    "text_encoder_2": _TEXT
    | {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
    },
    "scheduler": SCHEDULER
    | {
        "_class_name": "EulerDiscreteScheduler",
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "skip_prk_steps": True,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    },
    "pad_token": END,
    "pad_token_2": "!",
}
MODELS["sdxl"] = SDXL
