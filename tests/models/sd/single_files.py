# SPDX-License-Identifier: Apache-2.0
"""Small single files of every family with random weights; full ones without data."""

import json
import math

import ml_dtypes
import numpy as np

from gift_jax.models import safetensors_io
from gift_jax.models.sd import architectures, random_weights
from gift_jax.models.sd.single_file import configs as single_configs
from gift_jax.models.sd.single_file.families import FAMILIES

NAMES = tuple(FAMILIES)
_TEXT = {
    "vocab_size": 514,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "max_position_embeddings": 16,
}
_UNETS = {
    "sd15": {"block_out_channels": [32, 64], "cross_attention_dim": 64},
    "sd21": {
        "attention_head_dim": [1, 2],
        "block_out_channels": [64, 128],
        "cross_attention_dim": 64,
    },
    "sdxl": {
        "attention_head_dim": [1, 1, 2],
        "block_out_channels": [64, 64, 128],
        "cross_attention_dim": 64 + 128,
        "projection_class_embeddings_input_dim": 6 * 256 + 64,
        "transformer_layers_per_block": [1, 1, 2],
    },
}
_COMPONENT_DTYPES = {  # not all alike, as in some files
    "unet": "F16",
    "vae": "F32",
    "text_encoder": "BF16",
    "text_encoder_2": "F16",
}


def small_configs(name):
    """Returns configs of a family, as large as its rules allow a small model to be."""
    published = architectures.MODELS[name]
    unet = published["unet"] | {"layers_per_block": 1, "sample_size": 32}
    unet |= _UNETS[name]
    if name != "sdxl":
        unet["down_block_types"] = ["CrossAttnDownBlock2D", "DownBlock2D"]
        unet["up_block_types"] = ["UpBlock2D", "CrossAttnUpBlock2D"]
    vae = published["vae"] | {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
        "sample_size": 64,
    }
    configs = {"unet": unet, "vae": vae}
    for component in FAMILIES[name].text:
        configs[component] = published[component] | _TEXT
        if component == "text_encoder_2":
            configs[component] |= {"hidden_size": 128, "num_attention_heads": 2}
            configs[component]["projection_dim"] = 64
    scheduler = published["scheduler"]
    return configs | {"scheduler": {"prediction_type": "epsilon"} | scheduler}


def original_shapes(name, configs):
    """Returns {component: {original name: shape}} of a file."""
    rows = single_configs.all_tensors(configs, FAMILIES[name])
    return {
        component: {tensor.original: tensor.original_shape for tensor in tensors}
        for component, tensors in rows.items()
    }


def header(name):
    """Returns what a small file's header says."""
    said = {"modelspec.resolution": "64x64"}
    return said | ({"modelspec.prediction_type": "v"} if name == "sd21" else {})


def small_tensors(name, dtypes=_COMPONENT_DTYPES):
    """Returns {original name: random array} of a small file."""
    rng, arrays = np.random.default_rng(0), {}
    for component, shapes in original_shapes(name, small_configs(name)).items():
        dtype = safetensors_io.DTYPES[dtypes[component]]
        for tensor, shape in shapes.items():
            arrays[tensor] = rng.normal(0, 0.2, shape).astype(dtype)
            if tensor.endswith("position_ids"):
                arrays[tensor] = np.arange(math.prod(shape))[None]
    return arrays


def write(file, arrays, metadata=None):
    """Writes arrays as a safetensors file; returns its path."""
    codes = {np.dtype(t): code for code, t in safetensors_io.ALL_DTYPES.items()}
    assert np.dtype(ml_dtypes.bfloat16) in codes
    table = {
        name: (codes[array.dtype], array.shape, lambda array=array: array)
        for name, array in arrays.items()
    }
    safetensors_io.write_file(file, table, metadata)
    return file


def write_small(file, name, **changes):
    """Writes a small file of a family; changes: tensors to add, or None: leave out."""
    arrays = small_tensors(name) | changes
    arrays = {name: array for name, array in arrays.items() if array is not None}
    return write(file, arrays, header(name))


def write_without_data(file, shapes, metadata=None):
    """Writes a float16 file of any size whose data is a hole; returns its path."""
    content, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, shape in shapes.items():
        offsets = [end, end + 2 * math.prod(shape)]
        content[name] = {"dtype": "F16", "shape": shape, "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(content).encode()
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)
    return file


def write_tokenizer(folder):
    """Writes the tokenizer of the small files into a model's folder; returns it."""
    random_weights.write_tokenizer(folder / "tokenizer", 514, 16)
    return folder


def contents(*sources):
    """Returns {name: (dtype, shape, bytes)} of files and folders of safetensors."""
    result = {}
    for source in sources:
        files = sorted(source.rglob("*.safetensors")) if source.is_dir() else [source]
        for file in files:
            for name, entry in safetensors_io.read_header(file).items():
                array = safetensors_io.read_tensor(name, entry, only_floats=False)
                result[name] = entry.dtype, entry.shape, array.tobytes()
    return result
