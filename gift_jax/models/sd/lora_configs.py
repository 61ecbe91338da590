# SPDX-License-Identifier: Apache-2.0
"""What the configs of peft, beside a LoRA or in its header, say of alpha and rank.

Source: peft 0.21, tuners/lora/layer.py and config.py; diffusers 0.42, which has them in
a file's header.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from gift_jax.models import safetensors_io
from gift_jax.runtime.errors import UserError, one_line, parse_json, shown

_METADATA = "lora_adapter_metadata"  # of diffusers, in a file's header
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


class Configs:
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

    def scale(self, component: str, module: str, rank: int) -> float:
        """Returns alpha / rank of a module, or alpha / sqrt(rank); 1 without a config.

        Args: component: before the file's names, or "" if there is none.
        Raises: UserError for a config that is damaged, or asks for anything else.
        """
        if self._metadata is None:
            return 1.0
        config = self._config(component)
        r = _of_module(config.get("rank_pattern"), module, config.get("r", 8))
        alpha = config.get("lora_alpha", 8)
        alpha = _of_module(config.get("alpha_pattern"), module, alpha)
        is_number = type(alpha) in (int, float) and math.isfinite(alpha)
        if not is_number or r != rank:
            raise UserError(
                f"{one_line(self._file)}: says r={shown(r)}, lora_alpha={shown(alpha)} "
                f"for {one_line(module)}, whose tensors are of rank {rank}; copy "
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
