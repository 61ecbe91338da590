# SPDX-License-Identifier: Apache-2.0
"""The components of a FLUX.1's folder, and the keys of its transformer's config.json.

Defaults, and what is ignored, as in diffusers 0.42.
"""

from gift_jax.models.component import Kind
from gift_jax.models.config_keys import Keys, either, entries, flag, only, whole
from gift_jax.models.flux.transformer import PACK, Transformer, build_transformer
from gift_jax.models.sd.components import DIFFUSERS, EMA, LAYERS, WIDTH, defaults

KIND_OF = {  # the folder of a component: its kind
    "transformer": "flux_transformer",
    "vae": "vae",
    "text_encoder": "text_encoder",
    "text_encoder_2": "text_encoder_3",  # T5, Stable Diffusion 3's third
}


def _conflict(values) -> str:
    axes, size = values["axes_dims_rope"], values["attention_head_dim"]
    if sum(axes) != size or any(axis % 2 for axis in axes):
        return (
            f"axes_dims_rope={list(axes)} must be even, and {size} in sum, as "
            "attention_head_dim is"
        )
    channels = values["in_channels"]
    if channels % PACK**2 or values["out_channels"] not in (None, channels):
        return f"in_channels={channels} must divide by {PACK**2}, and be out_channels"
    return ""


_RULES = {
    "in_channels": WIDTH,
    "out_channels": either(WIDTH, only(None)),
    "num_layers": LAYERS,
    "num_single_layers": LAYERS,
    "attention_head_dim": whole(1, 256),
    "num_attention_heads": whole(1, 256),
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "guidance_embeds": flag(),
    "axes_dims_rope": either(entries(WIDTH, 3), only((16, 56, 56))),
    # with one value alone:
    "patch_size": only(1),
}
KINDS = {
    "flux_transformer": Kind(
        build_transformer,
        "diffusion_pytorch_model",
        {"_class_name": "FluxTransformer2DModel"},
        Keys(_RULES | DIFFUSERS, EMA, defaults(Transformer), _conflict, complete=True),
    ),
}
