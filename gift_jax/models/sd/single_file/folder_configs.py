# SPDX-License-Identifier: Apache-2.0
"""A model folder's configs, as far as a single file can say them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gift_jax.models import config_keys, safetensors_io
from gift_jax.models.config_keys import either, entries, flag, only, whole
from gift_jax.models.folder import class_names
from gift_jax.models.sd import scheduler_config
from gift_jax.models.sd.single_file import configs as single_configs
from gift_jax.models.sd.single_file import families, tensors
from gift_jax.models.sd.single_file.configs import Configs
from gift_jax.models.sd.single_file.families import FAMILIES, Family
from gift_jax.runtime.errors import UserError, shown

_CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}
_WORDS = 49408  # of CLIP's tokenizer, which readers of single files have

_WIDTH = whole(1, 2**20)
_LAYERS = whole(1, 1000)
_RULES = {  # of the keys that say which tensors there are
    "unet": {
        "block_out_channels": entries(_WIDTH),
        "down_block_types": entries(only("CrossAttnDownBlock2D", "DownBlock2D")),
        "layers_per_block": _LAYERS,
        "transformer_layers_per_block": either(_LAYERS, entries(_LAYERS)),
        "attention_head_dim": either(_WIDTH, entries(_WIDTH)),
        "cross_attention_dim": _WIDTH,
        "in_channels": _WIDTH,
        "out_channels": _WIDTH,
        "use_linear_projection": flag(),
        "projection_class_embeddings_input_dim": either(_WIDTH, only(None)),
        "sample_size": either(whole(1, 2**14), entries(_WIDTH, 2), only(None)),
    },
    "vae": {
        "block_out_channels": entries(_WIDTH),
        "layers_per_block": _LAYERS,
        "latent_channels": _WIDTH,
    },
    "text": {
        "vocab_size": whole(1, _WORDS),
        "hidden_size": _WIDTH,
        "intermediate_size": _WIDTH,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _WIDTH,
        "max_position_embeddings": _WIDTH,
        "projection_dim": _WIDTH,
    },
    "scheduler": {
        "prediction_type": only(*families.PREDICTIONS),
        "rescale_betas_zero_snr": flag(),
    },
}
_DEFAULTS = {  # of diffusers and transformers, where they are not null, false or 0
    "unet": {
        "act_fn": "silu",
        "addition_embed_type_num_heads": 64,
        "attention_head_dim": 8,
        "attention_type": "default",
        "block_out_channels": [320, 640, 1280, 1280],
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_dim": 1280,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": 4,
        "resnet_out_scale_factor": 1.0,
        "resnet_time_scale_shift": "default",
        "time_embedding_type": "positional",
        "transformer_layers_per_block": 1,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "use_linear_projection": False,
    },
    "vae": {
        "act_fn": "silu",
        "block_out_channels": [64],
        "down_block_types": ["DownEncoderBlock2D"],
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "mid_block_add_attention": True,
        "norm_num_groups": 32,
        "out_channels": 3,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"],
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    },
    "text": {
        "hidden_act": "quick_gelu",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 77,
        "num_attention_heads": 8,
        "num_hidden_layers": 12,
        "projection_dim": 512,
        "vocab_size": _WORDS,
    },
}
_NOT_COMPUTED = {  # keys that change no picture, or not with the values beside them
    "unet": ("sample_size", "upcast_attention", "addition_embed_type_num_heads")
    + ("mid_block_only_cross_attention", "cross_attention_norm"),
    "vae": ("sample_size", "force_upcast"),
}
_ONLY = {  # the other keys are judged; of these components, only these are
    "text": ("hidden_act", "layer_norm_eps", "max_position_embeddings", "vocab_size")
    + ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"),
    "scheduler": ("beta_end", "beta_schedule", "beta_start", "num_train_timesteps")
    + ("trained_betas", "prediction_type", "rescale_betas_zero_snr"),
}
_A_STAGE = ("attention_head_dim", "transformer_layers_per_block")


def _components(root: Path) -> list[str]:
    """Returns the components whose weights a single file holds."""
    file, names = root / "model_index.json", class_names(root)
    if "text_encoder_2" not in names:
        names["text_encoder_2"] = ""
    components = []
    for name, expected in _CLASSES.items():
        if names.get(name) == expected:
            components.append(name)
        elif name != "text_encoder_2" or names[name]:
            raise UserError(
                f"{file}: {name} is {names.get(name)}; must be {expected}, as in a "
                "Stable Diffusion 1, 2 or XL; others cannot be made a single file"
            )
    return components


def read(root: Path) -> Configs:
    """Returns {component: config} of a folder, scheduler's too, defaults filled in.

    Raises: UserError for a folder that is none of a Stable Diffusion, and for a key
      whose value no single file can say.
    """
    names = (*_components(root), "scheduler")
    configs = {name: _config(root, name) for name in names}
    channels = configs["unet"]["in_channels"], configs["vae"]["latent_channels"]
    if len(set(channels)) > 1:
        raise UserError(
            f"{root / 'unet'}: in_channels={channels[0]}; must be {channels[1]}, those "
            "of the VAE's latents, for a single file; keep the folder"
        )
    return configs


def _config(root: Path, component: str) -> dict[str, Any]:
    """Returns a component's config.json with the defaults of what it leaves out."""
    if component == "scheduler":
        file = root / "scheduler" / "scheduler_config.json"
    else:
        file = root / component / "config.json"
    config = safetensors_io.read_json(file)
    kind = _kind(component)
    nested = config.get("text_config")
    if kind == "text" and isinstance(nested, dict):
        config = nested
    config_keys.check(config_keys.Keys(_RULES[kind]), config, file)
    config = _defaults(kind, config) | config
    stages = len(config.get("block_out_channels", ()))
    for name in ("down_block_types", *_A_STAGE) if kind == "unet" else ():
        if isinstance(config[name], list) and len(config[name]) != stages:
            raise UserError(
                f"{file}: {name} has {len(config[name])} entries, block_out_channels "
                f"{stages}; must be as many"
            )
    return config


def _kind(component: str) -> str:
    return "text" if component.startswith("text_encoder") else component


def _defaults(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    if kind == "scheduler":
        name = scheduler_config.class_name(config)
        return {"prediction_type": "epsilon"} | scheduler_config.DEFAULTS.get(name, {})
    return _DEFAULTS[kind]


def family_of(configs: Configs) -> Family:
    """Returns the family that a folder's configs are of."""
    if "text_encoder_2" in configs:
        return FAMILIES["sdxl"]
    is_open_clip = configs["text_encoder"].get("hidden_act") == "gelu"
    return FAMILIES["sd21" if is_open_clip else "sd15"]


def resolution(configs: Configs) -> int:
    """Returns the pixels of a side that the UNet draws, 0 if a file cannot say them."""
    factor = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    size = configs["unet"].get("sample_size") or 0
    pixels = size * factor if isinstance(size, int) else 0
    header = {"modelspec.resolution": f"{pixels}x{pixels}"}
    return single_configs.resolution(header)


def check_same(
    root: Path, component: str, config: Mapping[str, Any], read: Mapping[str, Any]
) -> None:
    """Raises UserError for a config that is not what readers of the file will take."""
    kind = _kind(component)
    keys = _ONLY.get(kind) or sorted({*config, *read} - {*_NOT_COMPUTED[kind]})
    stages = len(config.get("block_out_channels", ()))
    for key in keys:
        if key.startswith("_"):
            continue
        own, theirs = config.get(key), read.get(key, _defaults(kind, read).get(key))
        pair = [own, theirs]
        if key in _A_STAGE:
            pair = [tensors.per_stage(value, stages) for value in pair]
        if pair[0] != pair[1] and (own or theirs):  # null, false and 0 are alike
            raise UserError(
                f"{root / component}: {key}={shown(own)} in its config, but readers "
                f"of a single file take {shown(theirs)}, since it has no place for a "
                "config; keep the folder"
            )
