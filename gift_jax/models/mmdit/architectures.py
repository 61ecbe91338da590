# SPDX-License-Identifier: Apache-2.0
"""The published Stable Diffusions 3 and 3.5, for what needs no weights.

As in the repositories stable-diffusion-3-medium-diffusers, stable-diffusion-3.5-medium
and stable-diffusion-3.5-large, less fields that say what made the file.
"""

from gift_jax.models.sd import architectures

IDS = {  # hub id -> of MODELS
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3-medium",
    "stabilityai/stable-diffusion-3.5-medium": "sd3.5-medium",
    "stabilityai/stable-diffusion-3.5-large": "sd3.5-large",
    "stabilityai/stable-diffusion-3.5-large-turbo": "sd3.5-large",
}
TRANSFORMER = {
    "_class_name": "SD3Transformer2DModel",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
    "sample_size": 128,
}
VAE = architectures.vae_config(
    (128, 256, 512, 512),
    force_upcast=True,
    latent_channels=16,
    latents_mean=None,
    latents_std=None,
    sample_size=1024,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    use_post_quant_conv=False,
    use_quant_conv=False,
)
T5 = {
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 32128,
}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
_CLIP = {"architectures": ["CLIPTextModelWithProjection"]}
_SHARED = {
    "vae": VAE,
    "text_encoder": architectures.SDXL["text_encoder"] | _CLIP,
    "text_encoder_2": architectures.SDXL["text_encoder_2"],
    "text_encoder_3": T5,
    "scheduler": SCHEDULER,
    "pad_token": architectures.END,
    "pad_token_2": "!",
}
MODELS = {
    "sd3-medium": _SHARED | {"transformer": TRANSFORMER},
    "sd3.5-medium": _SHARED
    | {
        "transformer": TRANSFORMER
        | {
            "dual_attention_layers": list(range(13)),
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
        },
    },
    "sd3.5-large": _SHARED
    | {
        "transformer": TRANSFORMER
        | {
            "caption_projection_dim": 2432,
            "num_attention_heads": 38,
            "num_layers": 38,
            "qk_norm": "rms_norm",
        },
    },
}


def model_index(scheduler: str) -> dict:
    """Returns the model_index.json of a model folder; scheduler: name of its class."""
    clip = ["transformers", "CLIPTextModelWithProjection"]
    return {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": "0.35.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": clip,
        "text_encoder_2": clip,
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
