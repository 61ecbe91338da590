# SPDX-License-Identifier: Apache-2.0
"""Writes a tiny random Stable Diffusion as a diffusers folder, without torch."""

import json

import jax
import numpy as np
from PIL import Image

from gift_jax.models import exports
from gift_jax.models.kinds import KINDS
from gift_jax.models.params import parameter_shapes
from gift_jax.models.sd import architectures, random_weights

# With every kind of block.
WHOLE_UNET = architectures.unet_config(
    (32, 64),
    attention_head_dim=2,
    cross_attention_dim=32,
    layers_per_block=1,
    mid_block_type="UNetMidBlock2DCrossAttn",
    sample_size=8,
)
# One resolution and no middle compile in half the time, where most of the suite's goes.
TINY_UNET = WHOLE_UNET | {
    "block_out_channels": [32],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["CrossAttnUpBlock2D"],
}
TINY_VAE = architectures.vae_config(
    (32, 64), layers_per_block=1, sample_size=16, scaling_factor=0.5
)
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
# SDXL: its two text encoders differ in everything, and so do its two sizes.
TINY_XL = {
    "unet": WHOLE_UNET
    | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "attention_head_dim": [2, 4],
        "cross_attention_dim": 80,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "projection_class_embeddings_input_dim": 72,
        "transformer_layers_per_block": [1, 2],
        "use_linear_projection": True,
    },
    "vae": TINY_VAE | {"force_upcast": True, "scaling_factor": 0.13},
    "text_encoder": TINY_TEXT | {"hidden_act": "quick_gelu"},
    "text_encoder_2": TINY_TEXT
    | {
        "hidden_act": "gelu",
        "hidden_size": 48,
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "projection_dim": 24,
    },
}
TINY_SCHEDULER = architectures.SCHEDULER | {
    "_class_name": "DDIMScheduler",
    "prediction_type": "epsilon",
}


def _write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


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

    return jax.tree_util.tree_map_with_path(draw, parameter_shapes(module))


def write_tiny(directory, scheduler=None, unet=None):
    """Writes a tiny random Stable Diffusion as a diffusers folder, without torch."""
    configs = {
        "unet": TINY_UNET | (unet or {}),
        "vae": TINY_VAE,
        "text_encoder": TINY_TEXT,
    }
    for seed, (kind, config) in enumerate(configs.items()):
        params = random_params(KINDS[kind].build(config), seed)
        exports.save_model_folder(directory / kind, config, params)
    random_weights.write_tokenizer(directory / "tokenizer", TINY_TEXT["vocab_size"], 16)
    scheduler = TINY_SCHEDULER | (scheduler or {})
    _write_json(directory / "scheduler" / "scheduler_config.json", scheduler)
    index = architectures.model_index(scheduler["_class_name"])
    _write_json(directory / "model_index.json", index)
    return directory


def write_tiny_xl(directory, **unet):
    """Writes a tiny random SDXL as a diffusers folder, without torch.

    Args: unet: other values of its config.
    """
    configs = TINY_XL | {"unet": TINY_XL["unet"] | unet}
    for seed, (kind, config) in enumerate(configs.items()):
        params = random_params(KINDS[kind].build(config), 10 + seed)
        exports.save_model_folder(directory / kind, config, params)
    for name, pad in (("tokenizer", architectures.END), ("tokenizer_2", "!")):
        size = TINY_TEXT["vocab_size"]
        random_weights.write_tokenizer(directory / name, size, 16, pad)
    scheduler = TINY_SCHEDULER | {"_class_name": "EulerDiscreteScheduler"}
    _write_json(directory / "scheduler" / "scheduler_config.json", scheduler)
    index = architectures.xl_model_index(scheduler["_class_name"])
    _write_json(directory / "model_index.json", index)
    return directory


def write_pictures(folder, count, seed):
    """Writes random pictures of the tiny model's size; returns the folder."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def relative_error(ours, theirs):
    """Largest difference of two arrays over the largest magnitude of the second."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def check_equal(what, ours, theirs, theirs_in_double=None, tolerance=1e-5):
    """Asserts that our float32 arrays are PyTorch's, to `tolerance`; prints the errors.

    PyTorch's own rounding can be larger than that: emoji-sd's VAE decoder in float32
    is 1.7e-5 off itself in float64, a noise schedule 1.4e-5. Where the two differ by
    more, ours has to be that close to PyTorch in float64, and no farther from it than
    PyTorch in float32 is.

    Args: what: what is compared, in what is printed. ours, theirs: name -> array.
      theirs_in_double: function that returns the same, called if need be; None if
      PyTorch in float32 has to do.
    """
    errors = {name: relative_error(ours[name], theirs[name]) for name in ours}
    for name, error in errors.items():
        rms = np.sqrt(np.mean(np.square(theirs[name])))
        print(f"{what} {name}: {error:.1e} from PyTorch in float32; rms {rms:.2g}")
    far = [name for name, error in errors.items() if not error <= tolerance]
    assert theirs_in_double or not far, far
    truth = theirs_in_double() if far else {}
    for name in far:
        of_ours = relative_error(ours[name], truth[name])
        of_theirs = relative_error(theirs[name], truth[name])
        print(f"  from float64: ours {of_ours:.1e}, PyTorch's float32 {of_theirs:.1e}")
        assert of_ours <= tolerance, name
        assert of_ours <= of_theirs, name
