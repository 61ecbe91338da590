# SPDX-License-Identifier: Apache-2.0
"""Which of the parameters train, get LoRA updates and lie where on a mesh.

The text's part of the joint attention is what cross-attention is in a UNet, see
`mmdit.trainable`. The blocks of one stream have none: text and image share all of them.
"""

from gift_jax.models.mmdit import trainable

_TEXT = r"/attn/(add_[qkv]_proj|to_add_out|norm_added_[qk])/"
_IMAGE = r"^transformer_blocks_\d+/attn/(to_[qkv]|to_out_0|norm_[qk])/"
TRAINABLE_SETS = {  # "attention": of both kinds of blocks
    "cross_attention": [(_TEXT, True), (r"", False)],
    "text_stream": [(_TEXT, True), (r"", False)],
    "image_stream": [(_IMAGE, True), (r"", False)],
    "attention": [(r"/attn/", True), (r"", False)],
    "all": [(r"", True)],
}

# those of diffusers' examples/dreambooth/train_dreambooth_lora_flux.py
LORA_TARGETS = (
    r"/(?:attn|ff|ff_context)/(add_k_proj|add_q_proj|add_v_proj|to_add_out|to_k|to_out_0"
    r"|to_q|to_v|net_0/proj|net_2)/kernel$"
)

PARTITION_RULES = (  # of a parameter's path: the axes of its last dimensions
    (r"/proj_mlp/kernel", ("fsdp", "tensor")),
    (r"/proj_out/kernel", ("tensor", "fsdp")),  # of the blocks of one stream
    *trainable.PARTITION_RULES,
)
