# SPDX-License-Identifier: Apache-2.0
"""LoRA by kohya's names: a module's name with underscores for dots, and its alpha.

"lora_unet_down_blocks_0_..._attn1_to_q.lora_down.weight", ".lora_up.weight", ".alpha".
What an underscore stands for, only the model's own names tell: names are looked up, not
taken apart. Trainers of SDXL name the UNet's modules as the original code does.
Source: kohya-ss/sd-scripts, networks/lora.py and library/sdxl_original_unet.py;
diffusers 0.42, loaders/lora_conversion_utils.py.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from gift_jax.models import safetensors_io
from gift_jax.runtime.errors import UserError, one_line

COMPONENTS = {  # by the start of a name; of a model with one text encoder, lora_te_
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
HALVES = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}
_ALPHA_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32")

# The original code's names of a UNet's parts.
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_IN_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_PART = re.compile(r"((?:down_blocks|up_blocks)\.\d+|mid_block)\.([a-z]+)\.(\d+)\.(.+)")


def prefix_of(name: str) -> str:
    """Returns the start of a name that is kohya's, or ""."""
    return next((p for p in COMPONENTS if name.startswith(p)), "")


def modules_by_name(component: str, modules: Iterable[str]) -> dict[str, str]:
    """Returns {what kohya's name has after its start: module} of a component.

    Args: modules: the names of the component's modules in PyTorch.
    """
    modules = list(modules)
    original = original_names(modules) if component == "unet" else {}
    names = [*original.items(), *((module, module) for module in modules)]
    return {name.replace(".", "_"): module for module, name in names}


def original_names(modules: Iterable[str]) -> dict[str, str]:
    """Returns {module of a UNet: its name in the original code}.

    There the layers on the way down are numbered through, those that halve the size
    too, and so are those on the way up; a layer's parts are numbered: resnet,
    transformer, and what doubles the size, as far as it has them.
    """
    parts = {module: match for module in modules if (match := _PART.match(module))}
    layers = {(m[1], m[2], int(m[3])) for m in parts.values()}
    blocks = _blocks(Counter((stage, kind) for stage, kind, _ in layers))
    names = {module: name for module, name in _OUTSIDE.items() if module in modules}
    for module, match in parts.items():
        stage, kind, number, rest = match.groups()
        block = blocks[stage, kind, int(number)]
        if kind == "resnets":
            rest = _IN_RESNET.get(rest, rest)
        elif kind == "downsamplers":
            rest = "op"
        names[module] = f"{block}.{rest}"
    return names


def _blocks(counts: Mapping[tuple[str, str], int]) -> dict[tuple[str, str, int], str]:
    """Returns {(stage, kind, number): block of the original code} of all layers.

    Args: counts: {(stage, kind): how many}.
    """
    blocks, stages = {}, sorted({stage for stage, _ in counts}, key=_order)
    down, up = 1, 0  # the first is conv_in
    for stage in stages:
        for i in range(counts[stage, "resnets"]):
            if stage == "mid_block":
                blocks[stage, "resnets", i] = f"middle_block.{2 * i}"
                blocks[stage, "attentions", i] = f"middle_block.{2 * i + 1}"
                continue
            is_down = stage.startswith("down")
            block = f"input_blocks.{down}" if is_down else f"output_blocks.{up}"
            blocks[stage, "resnets", i] = f"{block}.0"
            blocks[stage, "attentions", i] = f"{block}.1"
            part = 2 if counts[stage, "attentions"] else 1
            blocks[stage, "upsamplers", 0] = f"{block}.{part}"  # of the last layer
            down, up = down + is_down, up + (not is_down)
        if counts[stage, "downsamplers"]:
            blocks[stage, "downsamplers", 0] = f"input_blocks.{down}.0"
            down += 1
    return blocks


def _order(stage: str) -> tuple[str, int]:
    return stage.partition(".")[0], int(stage.partition(".")[2] or 0)


def read_alpha(name: str, entry: safetensors_io.Entry) -> float:
    """Returns a layer's alpha.

    Raises: UserError for one that scales nothing: kohya takes 0 for the rank, diffusers
      for 0.
    """
    at = f"{one_line(entry.file)}: {one_line(name)}"
    if entry.dtype not in _ALPHA_DTYPES:
        raise UserError(
            f"{at} has dtype {entry.dtype}; must be one of {', '.join(_ALPHA_DTYPES)}"
        )
    alpha = float(safetensors_io.read_tensor(name, entry, only_floats=False).item())
    if not alpha or not np.isfinite(alpha):
        raise UserError(
            f"{at} is {alpha:g}; must be a finite number other than 0; copy the file "
            "again"
        )
    return alpha


def state(
    component: str, module: str, down: np.ndarray, up: np.ndarray, alpha: float
) -> dict[str, np.ndarray]:
    """Returns the three tensors of a module's LoRA, float32.

    Args: down, up: as PyTorch lays them out.
    """
    prefix = next(p for p, name in COMPONENTS.items() if name == component)
    name = prefix + module.replace(".", "_")
    return {
        f"{name}.lora_down.weight": np.ascontiguousarray(down, np.float32),
        f"{name}.lora_up.weight": np.ascontiguousarray(up, np.float32),
        f"{name}.alpha": np.asarray(alpha, np.float32),
    }


def metadata(sizes: Iterable[tuple[int, float]]) -> dict[str, str]:
    """Returns what kohya's scripts write of a LoRA's size into a file's header.

    Args: sizes: (rank, alpha) of its layers.
    """
    ranks, alphas = zip(*sizes, strict=True)
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": _one(ranks),
        "ss_network_alpha": _one(alphas),
    }


def _one(values: Iterable[float]) -> str:
    values = set(values)
    return str(values.pop()) if len(values) == 1 else "Dynamic"


def made_for(notes: Mapping[str, str]) -> str:
    """Returns the kind of model that a header says its file was trained on, or ""."""
    keys = ("ss_base_model_version", "modelspec.architecture")
    return next((notes[key] for key in keys if notes.get(key)), "")
