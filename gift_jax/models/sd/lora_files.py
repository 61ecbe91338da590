# SPDX-License-Identifier: Apache-2.0
"""LoRA files by the names of diffusers, old ones too, and of peft.

Source: diffusers 0.42, loaders/lora_base.py and utils/state_dict_utils.py; peft 0.21,
tuners/lora/layer.py.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gift_jax.models import safetensors_io
from gift_jax.runtime.errors import UserError, one_line, parse_json, shown

NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_METADATA = "lora_adapter_metadata"  # of diffusers, in a file's header
_PEFT = "base_model.model."
_OTHER_KINDS = {  # part of a tensor's name: what such a file is
    r"^lora_(unet|te\d?)_": "is in kohya's names, which are not read; load it with "
    "diffusers and save it with save_lora_weights",
    r"dora_scale|lora_magnitude_vector": "is of a DoRA, which is not supported",
    r"\.lokr_|\.hada_": "is of a LoKr or LoHa, which are not supported",
}
_OLD_PROJECTIONS = {
    "unet": {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"},
    "text_encoder": {
        "to_q": "q_proj",
        "to_k": "k_proj",
        "to_v": "v_proj",
        "to_out": "out_proj",
    },
}
# Fields of peft's LoraConfig: those that are computed, and those that change nothing
# of a trained adapter. Any other one must be off.
_COMPUTED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_COMPUTED += ("peft_type", "init_lora_weights")
_HARMLESS = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "target_modules", "exclude_modules"),
    *("lora_dropout", "fan_in_fan_out", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "qalora_group_size", "eva_config", "runtime_config"),
    *("loftq_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
)
_OFF = (None, False, 0, "none", {}, [])
_INITIAL = (True, False, None, "gaussian", "orthogonal", "eva")  # others change W

# component -> {name of a tensor: (Flax path, its shape in PyTorch)}
Targets = Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]]
Change = Callable[[np.ndarray], np.ndarray]


class _Half(NamedTuple):
    """One tensor of a file: of what module, and whether it is down (A) or up (B)."""

    component: str
    module: str
    half: str


def find(path: Path) -> Path:
    """Returns the LoRA file of a folder, or the file itself."""
    for name in NAMES if path.is_dir() else ():
        if (path / name).is_file():
            return path / name
    return path


def read(file: Path, targets: Targets, scale: float) -> dict[str, Change]:
    """Returns {Flax path: float32 W, as PyTorch lays it out -> W + scale B A}.

    scale: beside the file's own, alpha / rank. Only its header is read; the tensors
    when the change is made.

    Raises: UserError naming the file and its first tensor that does not fit.
    """
    entries = safetensors_io.read_header(file)
    _check_kind(file, entries)
    halves = {name: _parse(name) for name in sorted(entries)}
    names = {half: name for name, half in reversed(halves.items()) if half}
    configs = _Configs(file, any(name.startswith(_PEFT) for name in entries))
    changes, reasons = {}, {}
    for name, half in halves.items():
        reason = _misfit(name, half, names, entries, targets)
        if reason:
            reasons[name] = reason
        elif half.half == "down":
            path, _ = targets[half.component][f"{half.module}.weight"]
            rank = entries[name].shape[0]
            own = configs.scale(half, rank, has_prefix=_has_prefix(name))
            up = names[half._replace(half="up")]
            pair = (name, entries[name]), (up, entries[up])
            changes[path] = _change(*pair, scale * own)
    refuse_misfits(file, reasons, len(entries))
    return changes


def refuse_misfits(file: Path, reasons: Mapping[str, str], count: int) -> None:
    """Raises UserError for tensors that a model has no place for.

    Args: reasons: of each such tensor. count: of all tensors of the file.
    """
    if not count:
        raise UserError(f"{one_line(file)}: has no tensors; copy it again")
    if reasons:
        name = min(reasons)
        raise UserError(
            f"{one_line(file)}: {one_line(name)} {reasons[name]}; {len(reasons)} of "
            f"{count} tensors do not fit: is the file made for another model?"
        )


def _check_kind(file, names):
    for pattern, meaning in _OTHER_KINDS.items():
        for name in sorted(names):
            if re.search(pattern, name):
                raise UserError(f"{one_line(file)}: {one_line(name)} {meaning}")


def _parse(name: str) -> _Half | None:
    """Returns what a tensor's name says, or None if it is no name of a LoRA's."""
    component, rest = _component(name.removeprefix(_PEFT))
    rest = rest.replace(".processor.", ".")
    old = _OLD_PROJECTIONS[component]
    rest = re.sub(
        r"\.(to_q|to_k|to_v|to_out)_lora\.(?=down|up)",
        lambda match: f".{old[match[1]]}.lora.",
        rest,
    )
    match = re.fullmatch(
        r"(.+)\.(?:lora_([AB])|lora(?:_linear_layer)?\.(down|up))\.weight", rest
    )
    if not match:
        return None
    module = match[1]
    if component == "text_encoder":  # which has lost the prefix in transformers 5
        module = "text_model." + module.removeprefix("text_model.")
    half = match[3] or {"A": "down", "B": "up"}[match[2]]
    return _Half(component, module, half)


def _component(name: str) -> tuple[str, str]:
    for component in _OLD_PROJECTIONS:
        if name.startswith(f"{component}."):
            return component, name.removeprefix(f"{component}.")
    is_text = name.startswith(("text_model.", "encoder.layers."))
    return "text_encoder" if is_text else "unet", name


def _has_prefix(name: str) -> bool:
    return name.startswith(tuple(f"{component}." for component in _OLD_PROJECTIONS))


def _misfit(name, half, names, entries, targets):
    """Returns why a tensor has no place in the model, or ""."""
    if half is None:
        return "is no tensor of a LoRA by the names of diffusers or peft"
    if names[half] != name:
        return f"is there twice, also as {one_line(names[half])}"
    target = targets[half.component].get(f"{half.module}.weight")
    if target is None or not target[0].endswith("/kernel"):
        return f"changes {one_line(half.module)}, which this model does not have"
    other = names.get(half._replace(half="up" if half.half == "down" else "down"))
    if other is None:
        return "has no other half"
    down, up = (name, other) if half.half == "down" else (other, name)
    out, *inner = target[1]
    A, B = entries[down].shape, entries[up].shape
    rank = A[0] if A else 0
    shapes = (rank, *inner), (out, rank, *[1] * len(inner[1:]))
    if not rank or shapes != (A, B):
        return (
            f"has shape {list(entries[name].shape)}, which gives no update of the "
            f"shape of {one_line(half.module)}, {list(target[1])}"
        )
    return ""


def _change(down, up, scale: float) -> Change:
    def change(W: np.ndarray) -> np.ndarray:
        A, B = (
            np.asarray(safetensors_io.read_tensor(*tensor), np.float32)
            for tensor in (down, up)
        )
        # a convolution's up is 1x1, so that it is a product too
        delta = B.reshape(len(B), -1) @ A.reshape(len(A), -1)
        return W + np.float32(scale) * delta.reshape(W.shape)

    return change


class _Configs:
    """What a file, or adapter_config.json beside it, says of alpha and rank."""

    def __init__(self, file: Path, is_peft: bool):
        self._file = file
        self._metadata: dict[str, Any] | None = None
        if is_peft:
            self._file = file.with_name("adapter_config.json")
            self._metadata = safetensors_io.read_json(self._file)
        else:
            text = safetensors_io.read_metadata(file).get(_METADATA)
            if text:
                self._metadata = self._parse(text)
        self._checked: dict[str, dict[str, Any]] = {}

    def scale(self, half: _Half, rank: int, has_prefix: bool) -> float:
        """Returns alpha / rank of a module, or alpha / sqrt(rank); 1 without a config.

        Raises: UserError for a config that is damaged, or asks for anything else.
        """
        if self._metadata is None:
            return 1.0
        config = self._config(half.component if has_prefix else "")
        r = _of_module(config.get("rank_pattern"), half.module, config.get("r", 8))
        alpha = config.get("lora_alpha", 8)
        alpha = _of_module(config.get("alpha_pattern"), half.module, alpha)
        is_number = type(alpha) in (int, float) and math.isfinite(alpha)
        if not is_number or r != rank:
            raise UserError(
                f"{one_line(self._file)}: says r={shown(r)}, lora_alpha={shown(alpha)} "
                f"for {one_line(half.module)}, whose tensors are of rank {rank}; copy "
                "the file again"
            )
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def _parse(self, text: str) -> dict[str, Any]:
        try:
            metadata = parse_json(text)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{one_line(self._file)}: its {_METADATA} is not JSON ({error})"
            ) from None
        if not isinstance(metadata, dict):
            raise UserError(
                f"{one_line(self._file)}: its {_METADATA} must be a JSON object"
            )
        return metadata

    def _config(self, component: str) -> dict[str, Any]:
        """Returns the LoraConfig of a component, every field known or off."""
        if component not in self._checked:
            prefix = f"{component}." if component else ""
            config = {
                name.removeprefix(prefix): content
                for name, content in (self._metadata or {}).items()
                if name.startswith(prefix)
            }
            self._check(config)
            self._checked[component] = config
        return self._checked[component]

    def _check(self, config: dict[str, Any]) -> None:
        wrong = [
            name
            for name, content in config.items()
            if name not in _COMPUTED + _HARMLESS and content not in _OFF
        ]
        if config.get("peft_type", "LORA") != "LORA":
            wrong.append("peft_type")
        if config.get("init_lora_weights") not in _INITIAL:
            wrong.append("init_lora_weights")
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = config.get(name) or {}
            plain = isinstance(pattern, dict) and all(
                re.fullmatch(r"\^?[\w.\\]+", key) for key in pattern
            )
            if not plain:
                wrong.append(name)
        if wrong:
            raise UserError(
                f"{one_line(self._file)}: {one_line(wrong[0])}="
                f"{json.dumps(config[wrong[0]])[:80]} is not supported"
            )


def _of_module(pattern: Any, module: str, default: Any) -> Any:
    """Returns a module's value in peft's rank_pattern or alpha_pattern.

    Source: peft `get_pattern_key`.
    """
    for key, content in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return content
    return default
