# SPDX-License-Identifier: Apache-2.0
"""Writes a tiny random Stable Diffusion as a diffusers folder, without torch."""

import json

import jax
import numpy as np

from gift_jax.models import hooks, weights

TINY_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
}
TINY_VAE = {
    "sample_size": 16,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "latent_channels": 4,
    "scaling_factor": 0.5,
}
TINY_TEXT = {
    "vocab_size": 514,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 512,
    "eos_token_id": 513,
    "pad_token_id": 513,
    "projection_dim": 32,
}
TINY_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
TINY_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.30.0",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}


def _write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def write_tokenizer(directory, max_length=16):
    """Writes a CLIP tokenizer that knows every byte and no merge: 514 tokens."""
    from transformers.models.clip.tokenization_clip import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    tokens = characters + [c + "</w>" for c in characters]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    _write_json(directory / "vocab.json", {t: i for i, t in enumerate(tokens)})
    (directory / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
        "pad_token": "<|endoftext|>",
    }
    _write_json(directory / "tokenizer_config.json", settings)


def random_params(module, seed):
    """Random parameters of a Flax module in which no scale is 1 and no bias is 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return 1 + 0.2 * noise
        if path[-1].key in ("kernel", "embedding"):
            fan_in = np.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else 4
            return noise / np.float32(np.sqrt(fan_in))
        return np.float32(0.2) * noise

    return jax.tree_util.tree_map_with_path(draw, hooks.parameter_shapes(module))


def write_tiny(directory, scheduler=None, unet=None):
    """Writes a tiny random Stable Diffusion as a diffusers folder, without torch."""
    configs = {
        "unet": TINY_UNET | (unet or {}),
        "vae": TINY_VAE,
        "text_encoder": TINY_TEXT,
    }
    for seed, (kind, config) in enumerate(configs.items()):
        params = random_params(weights.KINDS[kind].build(config), seed)
        weights.save_model_folder(directory / kind, config, params)
    write_tokenizer(directory / "tokenizer")
    _write_json(
        directory / "scheduler" / "scheduler_config.json",
        TINY_SCHEDULER | (scheduler or {}),
    )
    _write_json(directory / "model_index.json", TINY_INDEX)
    return directory


def relative_error(ours, theirs):
    """Largest difference of two arrays over the largest magnitude of the second."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()
