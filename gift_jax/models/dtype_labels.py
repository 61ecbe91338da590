# SPDX-License-Identifier: Apache-2.0
"""The dtype that a config.json names: in which transformers 5 loads the weights.

Without an argument diffusers loads its own components in float32, whatever is stored;
transformers 5 loads in the dtype that the config names, else in the stored one, and a
text encoder of another dtype than the UNet stops a pipeline. So a model folder names
float32, whatever is stored. A dtype that is asked for still decides for all.
"""

import json
from pathlib import Path

from gift_jax.models import safetensors_io

_KEYS = ("dtype", "torch_dtype")  # transformers 5's, and its older name
_NESTED = "text_config"


def write(folder: Path) -> None:
    """Has every component of transformers in a model folder name float32."""
    for file in sorted(folder.glob("*/config.json")):
        config = safetensors_io.read_json(file)
        is_ours = file.parent.name in ("text_encoder", "text_encoder_2")
        if not is_ours and "model_type" not in config:  # a component of diffusers
            continue
        labels = _labels(config, file.parent)
        nested = config.get(_NESTED)
        if isinstance(nested, dict):
            inner = nested | _labels(nested, file.parent)
            labels |= {_NESTED: inner} if inner != nested else {}
        if labels:
            text = json.dumps(config | labels, indent=2)
            file.write_text(text + "\n", encoding="utf-8")


def _labels(config, directory):
    """Returns the keys to change, with their values."""
    present = [key for key in _KEYS if config.get(key) is not None]
    if present:
        return {key: "float32" for key in present if config[key] != "float32"}
    return {"torch_dtype": "float32"} if _is_half(directory) else {}


def _is_half(directory):
    """Whether a tensor is stored in 16 bits."""
    return any(
        entry.dtype in ("F16", "BF16")
        for file in directory.glob("*.safetensors")
        for entry in safetensors_io.read_header(file).values()
    )
