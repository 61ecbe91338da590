# SPDX-License-Identifier: Apache-2.0
"""Every kind of component that can be read, by name, and its checked config.json."""

from pathlib import Path
from typing import Any

from gift_jax.models import config_keys, flux, mmdit, safetensors_io, sd, vision
from gift_jax.models.component import Kind
from gift_jax.runtime.errors import UserError, one_line, shown

KINDS: dict[str, Kind] = sd.KINDS | mmdit.KINDS | flux.KINDS | vision.KINDS
_OF_CLASS = {  # class of diffusers or transformers: the kind of what it holds
    name: kind
    for kind, one in KINDS.items()
    for name in (
        *one.extra_config.get("architectures", ()),
        one.extra_config.get("_class_name"),
    )
    if name
}


def of_class(name: str) -> str:
    """Returns the kind that a class of diffusers or transformers holds."""
    return _OF_CLASS[name]


def kind_of(root: Path, component: str) -> str:
    """Returns the kind of a model folder's component.

    That of its class in model_index.json, where it is known: a text encoder may have a
    projection, whatever it is called. Else that of its name.
    """
    file = root / "model_index.json"
    entry = safetensors_io.read_json(file).get(component) if file.is_file() else None
    name = entry[-1] if isinstance(entry, list) and entry else None
    return _OF_CLASS.get(name, component) if isinstance(name, str) else component


def read_config(directory: Path, kind: str) -> dict[str, Any]:
    """Returns the config that a component is built from, every key checked.

    Raises: UserError naming file and key, see `config_keys.check`.
    """
    file = directory / "config.json"
    config = safetensors_io.read_json(file)
    check_config(kind, config, file)
    return effective(kind, config)


def check_config(kind: str, config: dict[str, Any], file: Any) -> None:
    """Raises UserError naming a key that asks for what is not computed."""
    nested = KINDS[kind].nested
    if nested and not isinstance(config.get(nested, {}), dict):
        raise UserError(
            f"{one_line(file)}: {nested}={shown(config[nested])}; must be an object"
        )
    config_keys.check(KINDS[kind].keys, effective(kind, config), file)


def effective(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of a config.json that the component is built from."""
    nested = KINDS[kind].nested
    return config.get(nested, config) if nested else config
