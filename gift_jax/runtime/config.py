# SPDX-License-Identifier: Apache-2.0
"""Loading ml_collections config files and overriding their fields."""

import difflib
import importlib.metadata
import importlib.util
import os
import pathlib
from typing import Any, NoReturn

from ml_collections import ConfigDict

from gift_jax.runtime.errors import MAX_SHOWN, UserError, check_number, one_line, shown

# What the configs of one command have and those of no other.
_MARKS = {
    "train": "harmful",
    "attack": "lora",
    "evaluate": "references",
    "benchmark": "methods",
    "pretrain": "clip",
}


def _check_is_of(program: str, cfg: ConfigDict, spec: str) -> None:
    """Raises a UserError if a config is one of another command."""
    if program in _MARKS and _MARKS[program] not in cfg:
        fitting = [name for name, mark in _MARKS.items() if mark in cfg]
        hint = f"; it is one of gift_jax.{fitting[0]}" if fitting else ""
        raise UserError(
            f"--config={spec} is no config of gift_jax.{program}: it has no field "
            f"{_MARKS[program]!r}{hint}"
        )


def load_config(spec: str, program: str = "") -> ConfigDict:
    """Returns the locked config of FILE or FILE:variant.

    Args: program: whose config it must be, see `parse_config`; "": any.
    Raises: UserError if there is no such file or variant, or it has no get_config.
    """
    path, _, variant = spec.partition(":")
    file = pathlib.Path(path)
    if not os.path.isfile(file):  # unlike pathlib's, of any name
        raise UserError(
            f"--config={one_line(path)} is no file; try configs/emoji_gift.py"
        )
    module_spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"--config={path} is no Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"--config={path}, line {error.lineno}: {error.msg}") from error
    except ValueError as error:  # such as null characters
        raise UserError(f"--config={path} cannot be read: {error}") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={path} defines no get_config(variant)")
    try:
        cfg = module.get_config(variant)
    except ValueError as error:
        raise UserError(f"--config={one_line(spec)}: {error}") from error
    if not isinstance(cfg, ConfigDict):
        raise UserError(
            f"--config={path}: get_config returns a {type(cfg).__name__}; must be a "
            "ConfigDict"
        )
    _check_is_of(program, cfg, spec)
    return cfg.lock()


def with_variant(
    config: ConfigDict, name: str, **variants: dict[str, Any]
) -> ConfigDict:
    """Applies the named variant's overrides ("a.b": value); an unknown name raises."""
    if not name:
        return config
    if name not in variants:
        choices = ", ".join(variants) or "none"
        raise ValueError(f"unknown variant {name!r}; choices: {choices}")
    config.update_from_flattened_dict(variants[name])
    return config


def override(cfg: ConfigDict, text: str) -> None:
    field, equals, value = text.partition("=")
    if not equals:
        text = one_line(text)
        raise UserError(f"--config.{text} needs a value: --config.{text}=VALUE")
    *parents, name = field.split(".")
    node = cfg
    for part in parents:
        node = node[part] if part in node else None
        if not isinstance(node, ConfigDict):
            raise UserError(_unknown(cfg, field))
    if name not in node:
        raise UserError(_unknown(cfg, field))
    old = node[name]
    if isinstance(old, ConfigDict):
        some = f"config.{field}.{next(iter(old), 'NAME')}"
        raise UserError(
            f"config.{field}={shown(value)} must be of a field, not of a group of "
            f"them; name one, such as {some}"
        )
    try:
        new = _typed(old, value)
    except (ValueError, TypeError) as error:
        kind, was = type(old).__name__, str(old).replace("'", "")
        kind += f" of {type(old[0]).__name__}" if isinstance(old, tuple) and old else ""
        raise UserError(
            f"config.{field}={shown(value)} must be of type {kind}; try "
            f"--config.{field}={was}"
        ) from error
    for number in new if isinstance(new, tuple) else (new,):
        if isinstance(number, (int, float)):
            check_number(f"config.{field}", number, old)
    node[name] = new


def _typed(old: Any, value: str) -> Any:
    if isinstance(old, bool):
        words = {"true": True, "1": True, "false": False, "0": False}
        return words[value.lower()] if value.lower() in words else _raise(value)
    if isinstance(old, int):
        return int(value)
    if isinstance(old, float):
        return float(value)
    if isinstance(old, tuple):
        items = [item for item in value.strip("()[]").split(",") if item.strip()]
        kind = type(old[0]) if old else str
        return tuple(kind(item.strip()) for item in items)
    return value


def _raise(value: str) -> NoReturn:
    raise ValueError(value)


def _unknown(cfg: ConfigDict, field: str) -> str:
    known = list(cfg.to_dict() if not cfg else flatten(cfg.to_dict()))
    close = difflib.get_close_matches(field[:MAX_SHOWN], known, n=1, cutoff=0.5)
    hint = (
        f"did you mean config.{close[0]}?" if close else f"fields: {', '.join(known)}"
    )
    return f"config.{one_line(field[:MAX_SHOWN])} is no field of this config; {hint}"


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
