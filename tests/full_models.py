# SPDX-License-Identifier: Apache-2.0
"""The published Stable Diffusions with random weights, whole and made small.

The small ones keep everything but the widths and the depth: the resolutions, linear
projections, heads that differ by block, the activation, the pad token, the old names.
"""

from gift_jax.models.sd import architectures

_SMALL = {
    "unet": {
        "block_out_channels": [32, 64, 64, 64],
        "cross_attention_dim": 32,
        "layers_per_block": 1,
        "sample_size": 16,
    },
    "vae": {
        "block_out_channels": [32, 32, 64, 64],
        "layers_per_block": 1,
        "sample_size": 128,
    },
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 16,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "projection_dim": 16,
        "vocab_size": 520,
    },
}


_SMALL_XL = {
    "unet": {
        "addition_time_embed_dim": 8,
        "attention_head_dim": [2, 4, 8],
        "block_out_channels": [32, 64, 64],
        "cross_attention_dim": 32 + 48,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
        "transformer_layers_per_block": [1, 2, 3],
    },
    "text_encoder_2": {"hidden_size": 48},
}


def configs(name):
    """Returns the configs of "sd15", "sd21", "sdxl", "small-sd15" and so on."""
    whole = architectures.MODELS[name.removeprefix("small-")]
    if not name.startswith("small-"):
        return whole
    small = whole | {kind: whole[kind] | changes for kind, changes in _SMALL.items()}
    if "text_encoder_2" in whole:
        small["unet"] |= _SMALL_XL["unet"]
        second = _SMALL["text_encoder"] | _SMALL_XL["text_encoder_2"]
        small["text_encoder_2"] = whole["text_encoder_2"] | second
    elif isinstance(whole["unet"]["attention_head_dim"], list):
        small["unet"] |= {"attention_head_dim": [2, 4, 8, 8]}
    return small
