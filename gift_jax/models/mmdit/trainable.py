# SPDX-License-Identifier: Apache-2.0
"""Which of a transformer's parameters train, get LoRA updates and lie where on a mesh.

What cross-attention is in a UNet, by which text acts on an image, is here the text's
part of the joint attention: the stream's queries, keys, values, their norms and its
output.
"""

_TEXT = r"/attn/(add_[qkv]_proj|to_add_out|norm_added_[qk])/"
_IMAGE = r"/attn2?/(to_[qkv]|to_out_0|norm_[qk])/"
_PLACES = r"^pos_embed/pos_embed$"  # sines and cosines, which are no parameters
# Each rule is a list of (pattern, trains?); the first pattern found in a path decides.
TRAINABLE_SETS = {
    "cross_attention": [(_TEXT, True), (r"", False)],
    "text_stream": [(_TEXT, True), (r"", False)],
    "image_stream": [(_IMAGE, True), (r"", False)],
    "attention": [(_TEXT, True), (_IMAGE, True), (r"", False)],
    "all": [(_PLACES, False), (r"", True)],
}

# those of diffusers' examples/dreambooth/train_dreambooth_lora_sd3.py
LORA_TARGETS = (
    r"/attn/(add_k_proj|add_q_proj|add_v_proj|to_add_out|to_k|to_out_0|to_q|to_v)"
    r"/kernel$"
)

PARTITION_RULES = (  # of a parameter's path: the axes of its last dimensions
    (
        r"(to_[qkv]|add_[qkv]_proj|net_0/proj|[qkv]_proj|fc1|SelfAttention/[qkv]|wi_[01])"
        r"/kernel",
        ("fsdp", "tensor"),
    ),
    (
        r"(to_out_0|to_add_out|net_2|out_proj|fc2|SelfAttention/o|wo)/kernel",
        ("tensor", "fsdp"),
    ),
    (r"(kernel|embedding|pos_embed/pos_embed)", ("fsdp",)),
)
