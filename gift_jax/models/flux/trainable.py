# SPDX-License-Identifier: Apache-2.0
"""Which of the parameters train, get LoRA updates and lie where on a mesh.

As in `mmdit.trainable`: "attention" is of the blocks of one stream, too. These are part
of neither the text's stream nor the image's, which share all of them.
"""

from gift_jax.models.mmdit import trainable

_IMAGE = r"^transformer_blocks_\d+/attn/(to_[qkv]|to_out_0|norm_[qk])/"
TRAINABLE_SETS = trainable.TRAINABLE_SETS | {
    "image_stream": [(_IMAGE, True), (r"", False)]
}

# those of diffusers' examples/dreambooth/train_dreambooth_lora_flux.py
LORA_TARGETS = (
    r"/(?:attn|ff|ff_context)/(add_k_proj|add_q_proj|add_v_proj|to_add_out|to_k|to_out_0"
    r"|to_q|to_v|net_0/proj|net_2)/kernel$"
)

PARTITION_RULES = (  # of a parameter's path: the axes of its last dimensions
    (r"proj_mlp/kernel", ("fsdp", "tensor")),
    (r"single_transformer_blocks_\d+/proj_out/kernel", ("tensor", "fsdp")),
    *trainable.PARTITION_RULES,
)
