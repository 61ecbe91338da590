# SPDX-License-Identifier: Apache-2.0
"""The published Stable Diffusions with random weights, whole and made small.

The small ones keep everything but the widths and the depth: four resolutions, linear
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


def configs(name):
    """Returns the configs of "sd15", "sd21", "small-sd15" or "small-sd21"."""
    whole = architectures.MODELS[name.removeprefix("small-")]
    if not name.startswith("small-"):
        return whole
    small = whole | {kind: whole[kind] | changes for kind, changes in _SMALL.items()}
    if isinstance(whole["unet"]["attention_head_dim"], list):
        small["unet"] |= {"attention_head_dim": [2, 4, 8, 8]}
    return small
