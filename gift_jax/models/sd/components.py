# SPDX-License-Identifier: Apache-2.0
"""The components of a Stable Diffusion's folder, and the keys of their config.json.

Defaults, and what is ignored, as in diffusers 0.42 and transformers 5.24.
"""

import dataclasses

from gift_jax.models import safetensors_io
from gift_jax.models.component import Kind
from gift_jax.models.config_keys import (
    Keys,
    either,
    entries,
    flag,
    number,
    only,
    whole,
)
from gift_jax.models.ops.activations import ACTIVATIONS
from gift_jax.models.sd.clip import (
    CLIPTextConfig,
    ProjectedCLIPTextConfig,
    build_projected_text,
    build_text,
)
from gift_jax.models.sd.unet import (
    EMBEDDING_ACTIVATIONS,
    NUM_SIZES,
    UNet,
    build_unet,
)
from gift_jax.models.sd.vae import VAE, build_vae

LAYERS = whole(1, 1000)
WIDTH = whole(1, 2**20)
SIDE = whole(1, 2**14)
_SILU = only("silu", "swish")
# What training scripts add to the config of averaged weights; diffusers ignores them.
EMA = frozenset(
    ("decay", "inv_gamma", "min_decay", "optimization_step", "power")
    + ("update_after_step", "use_ema_warmup")
)
DIFFUSERS = {"_use_default_values": only([])}  # keys that the file has in vain


def defaults(cls) -> dict:
    """Returns {field: its default} of a dataclass."""
    return {field.name: field.default for field in dataclasses.fields(cls)}


def _blocks_conflict(values, lists=()) -> str:
    """Says which lists are not as long as block_out_channels, or do not divide."""
    channels, groups = values["block_out_channels"], values["norm_num_groups"]
    for name in ("down_block_types", "up_block_types", *lists):
        value = values[name]
        if isinstance(value, (list, tuple)) and len(value) != len(channels):
            return (
                f"{name} has {len(value)} entries, block_out_channels "
                f"{len(channels)}; must be as many"
            )
    uneven = [width for width in channels if width % groups]
    if uneven:
        return (
            f"block_out_channels has {uneven[0]}; must be multiples of "
            f"norm_num_groups={groups}"
        )
    return ""


# --- UNet -----------------------------------------------------------------------------

_A_STAGE = ("layers_per_block", "attention_head_dim", "transformer_layers_per_block")
_A_STAGE += ("only_cross_attention", "cross_attention_dim")


def _unet_conflict(values) -> str:
    conflict = _blocks_conflict(values, _A_STAGE)
    if conflict:
        return conflict
    text = values["cross_attention_dim"]
    if isinstance(text, list) and len(set(text)) > 1:
        return f"cross_attention_dim={text}; must be equal, as one text encoder's is"
    channels, heads = values["block_out_channels"], values["attention_head_dim"]
    if not isinstance(heads, (list, tuple)):
        heads = [heads] * len(channels)
    for width, count in zip(channels, heads, strict=True):
        if width % count:
            return (
                f"attention_head_dim has {count}, the number of heads; must divide "
                f"block_out_channels {width}"
            )
    if values["addition_embed_type"]:
        width = values["addition_time_embed_dim"]
        whole = values["projection_class_embeddings_input_dim"]
        if width is None or whole is None or whole <= NUM_SIZES * width:
            return (
                f"projection_class_embeddings_input_dim={whole} must be above "
                f"{NUM_SIZES} times addition_time_embed_dim={width}, and both be set"
            )
        if values["freq_shift"] == width // 2:
            return f"freq_shift={values['freq_shift']} must differ from {width // 2}"
    if values["freq_shift"] == channels[0] // 2:
        return f"freq_shift={values['freq_shift']} must differ from half the channels"
    return ""


_UNET_RULES = {
    "sample_size": either(SIDE, entries(SIDE, 2), only(None)),
    "in_channels": WIDTH,
    "out_channels": WIDTH,
    "center_input_sample": flag(),
    "flip_sin_to_cos": flag(),
    "freq_shift": number(),
    "down_block_types": entries(only("CrossAttnDownBlock2D", "DownBlock2D")),
    "mid_block_type": only("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "up_block_types": entries(only("CrossAttnUpBlock2D", "UpBlock2D")),
    "only_cross_attention": either(flag(), entries(flag())),
    "block_out_channels": entries(WIDTH),
    "layers_per_block": either(LAYERS, entries(LAYERS)),
    "downsample_padding": only(0, 1),
    "act_fn": _SILU,
    "norm_num_groups": WIDTH,
    "norm_eps": number(0),
    "cross_attention_dim": either(WIDTH, entries(WIDTH)),
    "transformer_layers_per_block": either(LAYERS, entries(LAYERS)),
    "attention_head_dim": either(WIDTH, entries(WIDTH)),
    "use_linear_projection": flag(),
    "time_embedding_dim": either(WIDTH, only(None)),
    "time_embedding_act_fn": only(None, *EMBEDDING_ACTIVATIONS),
    "timestep_post_act": only(None, *EMBEDDING_ACTIVATIONS),
    "conv_in_kernel": only(1, 3, 5, 7),
    "conv_out_kernel": only(1, 3, 5, 7),
    "addition_embed_type": only(None, "text_time"),
    "addition_time_embed_dim": either(WIDTH, only(None)),
    "projection_class_embeddings_input_dim": either(WIDTH, only(None)),
    # with one value alone:
    "attention_type": only("default"),
    "class_embed_type": only(None),
    "class_embeddings_concat": only(False),
    "dropout": only(0),
    "dual_cross_attention": only(False),
    "encoder_hid_dim": only(None),
    "encoder_hid_dim_type": only(None),
    "mid_block_scale_factor": only(1),
    "num_attention_heads": only(None),
    "num_class_embeds": only(None),
    "resnet_out_scale_factor": only(1),
    "resnet_skip_time_act": only(False),
    "resnet_time_scale_shift": only("default"),
    "reverse_transformer_layers_per_block": only(None),
    "time_cond_proj_dim": only(None),
    "time_embedding_type": only("positional"),
}
_UNET_HARMLESS = EMA | {  # used with another value of a key above alone
    "addition_embed_type_num_heads",
    "cross_attention_norm",
    "mid_block_only_cross_attention",
    "upcast_attention",  # scores are float32
}

# --- VAE ------------------------------------------------------------------------------

_VAE_RULES = {
    "in_channels": only(3),
    "out_channels": only(3),
    "down_block_types": entries(only("DownEncoderBlock2D")),
    "up_block_types": entries(only("UpDecoderBlock2D")),
    "block_out_channels": entries(WIDTH),
    "layers_per_block": LAYERS,
    "act_fn": _SILU,
    "latent_channels": WIDTH,
    "norm_num_groups": WIDTH,
    "sample_size": either(SIDE, entries(SIDE)),
    "scaling_factor": number(0),
    "use_quant_conv": flag(),
    "use_post_quant_conv": flag(),
    "mid_block_add_attention": flag(),
    "shift_factor": either(number(), only(None)),  # which the model's family may refuse
    # with one value alone:
    "latents_mean": only(None),
    "latents_std": only(None),
}
_VAE_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
}

# --- text encoder ---------------------------------------------------------------------


def _text_conflict(values) -> str:
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if width % heads:
        return f"hidden_size={width}; must be a multiple of num_attention_heads={heads}"
    return ""


_TEXT_RULES = {
    "vocab_size": whole(),
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": WIDTH,
    "max_position_embeddings": WIDTH,
    "hidden_act": only(*ACTIVATIONS),
    "layer_norm_eps": number(0),
    "eos_token_id": whole(0),
    # with one value alone:
    "attention_dropout": only(0, None),
    "use_attention_mask": only(False, None),
}
TEXT_HARMLESS = frozenset(  # what every config of transformers may have
    """
    add_cross_attention architectures bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dropout dtype early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_factor
    initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length
    min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_scores
    pad_token_id prefix problem_type projection_dim pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16
    """.split()
)


def _text_kind(build, fields, rules, architecture) -> Kind:
    """Returns the kind of a text encoder, with or without a projection."""
    return Kind(
        build,
        "model",
        {"architectures": [architecture], "model_type": "clip_text_model"},
        Keys(
            rules,
            TEXT_HARMLESS - rules.keys(),
            defaults(fields),
            _text_conflict,
            complete=True,
        ),
        nested="text_config",
        other_name=_without_prefix,
    )


def _without_prefix(name: str) -> str:
    return name.removeprefix("text_model.")  # as transformers 5 builds its class


KINDS = {
    "unet": Kind(
        build_unet,
        "diffusion_pytorch_model",
        {"_class_name": "UNet2DConditionModel"},
        Keys(
            _UNET_RULES | DIFFUSERS,
            _UNET_HARMLESS,
            defaults(UNet),
            _unet_conflict,
            complete=True,
        ),
    ),
    "vae": Kind(
        build_vae,
        "diffusion_pytorch_model",
        {"_class_name": "AutoencoderKL"},
        Keys(
            _VAE_RULES | DIFFUSERS,
            EMA | {"force_upcast"},
            defaults(VAE) | _VAE_BLOCKS | {"shift_factor": None},
            _blocks_conflict,
            complete=True,
        ),
        other_name=safetensors_io.old_name,
    ),
    "text_encoder": _text_kind(
        build_text, CLIPTextConfig, _TEXT_RULES, "CLIPTextModel"
    ),
    "text_encoder_2": _text_kind(
        build_projected_text,
        ProjectedCLIPTextConfig,
        _TEXT_RULES | {"projection_dim": WIDTH},
        "CLIPTextModelWithProjection",
    ),
}
