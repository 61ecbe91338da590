# SPDX-License-Identifier: Apache-2.0
"""The components of a Stable Diffusion 3's folder, and the keys of their config.json.

Defaults, and what is ignored, as in diffusers 0.42 and transformers 5.24.
"""

from gift_jax.models.component import Kind
from gift_jax.models.config_keys import Keys, either, entries, number, only, whole
from gift_jax.models.mmdit.t5 import ACTIVATION, T5Config, build_t5
from gift_jax.models.mmdit.transformer import Transformer, build_transformer
from gift_jax.models.sd.components import (
    DIFFUSERS,
    EMA,
    LAYERS,
    SIDE,
    TEXT_HARMLESS,
    WIDTH,
    defaults,
)

KIND_OF = {  # the folder of a component: its kind
    "transformer": "transformer",
    "vae": "vae",
    "text_encoder": "text_encoder_2",  # with a projection, unlike that of SD 1.x
    "text_encoder_2": "text_encoder_2",
    "text_encoder_3": "text_encoder_3",
}
_HEADS = whole(1, 256)

# --- transformer ----------------------------------------------------------------------


def _transformer_conflict(values) -> str:
    width = values["num_attention_heads"] * values["attention_head_dim"]
    if values["caption_projection_dim"] != width:
        return (
            f"caption_projection_dim={values['caption_projection_dim']} must be "
            f"num_attention_heads times attention_head_dim={width}"
        )
    if width % 4:
        return f"num_attention_heads times attention_head_dim={width} must divide by 4"
    if values["sample_size"] < values["patch_size"]:
        return (
            f"sample_size={values['sample_size']} must be at least patch_size="
            f"{values['patch_size']}"
        )
    return ""


_TRANSFORMER_RULES = {
    "sample_size": SIDE,
    "patch_size": whole(1, 64),
    "in_channels": WIDTH,
    "num_layers": LAYERS,
    "attention_head_dim": _HEADS,
    "num_attention_heads": _HEADS,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "out_channels": either(WIDTH, only(None)),
    "pos_embed_max_size": whole(1, 1024),
    "dual_attention_layers": either(only([]), entries(whole(0, 1000))),
    "qk_norm": only(None, "rms_norm"),
}

# --- T5 -------------------------------------------------------------------------------


def _t5_conflict(values) -> str:
    if values["feed_forward_proj"] != "gated-gelu":  # T5 1.0's, if not named
        return "feed_forward_proj must be 'gated-gelu', as T5 1.1's is"
    quarter = values["relative_attention_num_buckets"] // 4
    if values["relative_attention_max_distance"] <= quarter:
        return (
            f"relative_attention_max_distance="
            f"{values['relative_attention_max_distance']} must be above a quarter of "
            f"relative_attention_num_buckets, {quarter}"
        )
    return ""


_T5_RULES = {
    "vocab_size": whole(),
    "d_model": WIDTH,
    "d_kv": WIDTH,
    "d_ff": WIDTH,
    "num_layers": LAYERS,
    "num_heads": WIDTH,
    "relative_attention_num_buckets": whole(4, 2**12),
    "relative_attention_max_distance": whole(1, 2**20),
    "layer_norm_epsilon": number(0),
    # with one value alone:
    "feed_forward_proj": only("gated-gelu"),
    "dense_act_fn": only(ACTIVATION),
    "is_gated_act": only(True),
    "is_decoder": only(False),
}
_T5_HARMLESS = TEXT_HARMLESS | frozenset(  # of a decoder, of training, or old
    """
    classifier_dropout dropout_rate eos_token_id n_positions num_decoder_layers
    output_past scale_decoder_outputs use_cache
    """.split()
)
_T5_TABLE = "encoder.embed_tokens.weight"  # the same table by its other name


KINDS = {
    "transformer": Kind(
        build_transformer,
        "diffusion_pytorch_model",
        {"_class_name": "SD3Transformer2DModel"},
        Keys(
            _TRANSFORMER_RULES | DIFFUSERS,
            EMA,
            defaults(Transformer),
            _transformer_conflict,
            complete=True,
        ),
    ),
    "text_encoder_3": Kind(
        build_t5,
        "model",
        {"architectures": ["T5EncoderModel"], "model_type": "t5"},
        Keys(
            _T5_RULES,
            _T5_HARMLESS - _T5_RULES.keys(),
            defaults(T5Config) | {"feed_forward_proj": "relu"},
            _t5_conflict,
            complete=True,
        ),
        other_name=lambda name: _T5_TABLE if name == "shared.weight" else name,
        unread=(_T5_TABLE,),
    ),
}
