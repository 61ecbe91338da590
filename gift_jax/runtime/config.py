# SPDX-License-Identifier: Apache-2.0
"""Config files: their fields, each declared once, loading, overriding, checking.

A frozen dataclass beside the code that uses it declares a group of fields: default,
bounds, choices and meaning. `to_config` makes the ConfigDict that a config file and
the command line edit; `resolve` checks it and returns the dataclass.
"""

import dataclasses
import difflib
import importlib.util
import json
import os
import pathlib
import re
import traceback
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from ml_collections import ConfigDict

from gift_jax.runtime.errors import (
    MAX_SHOWN,
    UserError,
    at_least,
    check_number,
    one_line,
    parse_json,
    shown,
)
from gift_jax.runtime.errors import above as check_above
from gift_jax.runtime.errors import choice as check_choice

# A field of texts with commas: without brackets its value is one of them.
PROMPTS = "samples.prompts"

# --- declaring fields -----------------------------------------------------------------


def number(default, *, low=None, high=None, above=None, doc: str = "") -> Any:
    """Declares an int or float field, low <= value <= high, or value > above."""
    limits = {"low": low, "high": high, "above": above}
    return dataclasses.field(default=default, metadata={"doc": doc, **limits})


def numbers(default: tuple, *, low=None, high=None, doc: str = "") -> Any:
    """Declares a tuple of whole numbers, each low <= value <= high."""
    limits = {"low": low, "high": high, "above": None}
    return dataclasses.field(default=default, metadata={"doc": doc, **limits})


def choice(default: Any, choices: Iterable[str], doc: str = "") -> Any:
    """Declares a field of one of some words, or with a tuple as default, of several."""
    metadata = {"doc": doc, "choices": tuple(choices)}
    return dataclasses.field(default=default, metadata=metadata)


def value(default: Any, doc: str = "") -> Any:
    """Declares a text, a bool or a tuple of texts, of any value."""
    return dataclasses.field(default=default, metadata={"doc": doc})


def group(fields: Any, doc: str = "") -> Any:
    """Declares a group of fields: a dataclass of them, or an instance for defaults."""
    make = fields if isinstance(fields, type) else lambda: fields
    return dataclasses.field(default_factory=make, metadata={"doc": doc})


def to_config(fields: Any) -> ConfigDict:
    """Returns the unlocked ConfigDict of a dataclass that declares fields.

    Args: fields: the class, for its defaults, or an instance.
    """
    instance = fields() if isinstance(fields, type) else fields
    config = ConfigDict()
    for field in dataclasses.fields(instance):
        content = getattr(instance, field.name)
        if dataclasses.is_dataclass(content):
            content = to_config(content)
        elif content == ():
            content = ("",)[:0]  # a ConfigDict's field keeps the type of its default
        config[field.name] = content
    return config


def resolve(config: Any, cls: type, prefix: str = "config", **others) -> Any:
    """Returns a group of a config as its dataclass, every field checked.

    Args: config: ConfigDict or dict with the fields of `cls`; further ones are not
      read. prefix: of the fields' names in errors. others: fields to take from here.
    Raises: UserError naming the first field that breaks its rule; so may the class's
      own `check(prefix)`, for rules about several fields.
    """
    values = dict(others)
    for field in dataclasses.fields(cls):
        name = f"{prefix}.{field.name}"
        if field.name in values:
            continue
        if field.name not in config:
            raise UserError(f"{name} is missing; it is a field of every such config")
        content = config[field.name]
        kind = _group_of(field)
        if kind is not None:
            values[field.name] = resolve(content, kind, name)
        else:
            if isinstance(field.default, tuple) and isinstance(content, str):
                content = (content,)  # or it would be read letter by letter
            content = _as_declared(name, content, field.metadata)
            _check_field(name, content, field.metadata)
            values[field.name] = content
    instance = cls(**values)
    if hasattr(instance, "check"):
        instance.check(prefix)
    return instance


def resolve_group(config: Any, name: str, cls: type) -> Any:
    """Returns one top-level group of a config as its dataclass, every field checked.

    Raises: UserError if the config has no such group, or as `resolve`.
    """
    if name not in config:
        raise UserError(
            f"config.{name} is missing: this config is of another method; start from a "
            "config file that is made for it"
        )
    return resolve(config[name], cls, f"config.{name}")


def _group_of(field: dataclasses.Field) -> type | None:
    if field.default_factory is dataclasses.MISSING:
        return None
    default = field.default_factory()
    return type(default) if dataclasses.is_dataclass(default) else None


def _as_declared(name: str, content: Any, metadata: Mapping[str, Any]) -> Any:
    """Returns a tuple in place of a list, and numbers in place of their texts."""
    if not _is_many(content):
        return content
    if "low" in metadata:
        return tuple(_whole_number(name, str(item)) for item in content)
    return tuple(content)


def _is_many(content: Any) -> bool:
    return isinstance(content, (tuple, list))


def _check_field(name: str, content: Any, metadata: Mapping[str, Any]) -> None:
    for item in content if _is_many(content) else (content,):
        if "choices" in metadata:
            check_choice(name, item, metadata["choices"])
        if metadata.get("above") is not None:
            check_above(name, item, metadata["above"], 1)
        elif metadata.get("low") is not None:
            at_least(name, item, metadata["low"])
        high = metadata.get("high")
        if high is not None and item > high:
            raise UserError(f"{name}={item} must be at most {high}; try {name}={high}")


def _whole_number(name: str, text: str) -> int:
    if not text.strip().isdecimal():
        raise UserError(
            f"{name}={shown(text)} must be whole numbers; try --{name}=100,200"
        )
    return int(text)


def describe(cls: type, config: Any, prefix: str = "config") -> list[tuple[str, str]]:
    """Returns (field=value, its meaning and bounds) of every field of a dataclass."""
    rows = []
    for field in dataclasses.fields(cls):
        if field.name not in config:
            continue
        name, content = f"{prefix}.{field.name}", config[field.name]
        if (kind := _group_of(field)) is not None:
            rows += describe(kind, content, name)
            continue
        metadata, rules = field.metadata, []
        if "choices" in metadata:
            rules.append("one of " + ", ".join(map(str, metadata["choices"])))
        for word in ("above", "low", "high"):
            if metadata.get(word) is not None:
                at = {"above": "above", "low": "at least", "high": "at most"}[word]
                rules.append(f"{at} {metadata[word]}")
        text = metadata.get("doc", "") + (f" ({'; '.join(rules)})" if rules else "")
        rows.append((f"{name}={_written(content)}", text))
    return rows


def _written(content: Any) -> str:
    if not _is_many(content):
        return str(content)
    plain = [re.fullmatch(r"[\w.-]+", str(item)) for item in content]
    if not all(plain):  # as a list, which the shell is to leave alone
        return f"'{json.dumps(list(content), ensure_ascii=False)}'"
    return ",".join(map(str, content))


# --- files ----------------------------------------------------------------------------


def check_kind(program: str, config: ConfigDict, spec: str) -> None:
    """Raises a UserError if a config, from `--config=spec`, is another command's."""
    kind = config.get("kind", "")
    if program and kind != program:
        hint = f"; it is one of gift_jax.{kind}" if kind else ""
        raise UserError(f"--config={spec} is no config of gift_jax.{program}{hint}")


def find_config(path: str) -> pathlib.Path:
    """Returns the config file of a name such as configs/emoji_gift.py.

    A file of that name where the command runs comes first; then the one that the
    package brings: gift_jax/configs in an installed wheel, configs beside gift_jax in a
    clone.

    Raises: UserError if there is neither.
    """
    if os.path.isfile(path):  # unlike pathlib's, of any name
        return pathlib.Path(path)
    package = pathlib.Path(__file__).resolve().parents[1]
    wheel_configs = package / "configs"
    folder = wheel_configs if wheel_configs.is_dir() else package.parent / "configs"
    if os.path.dirname(path) == "configs":
        path_here = os.path.join(folder, os.path.basename(path))
        if os.path.isfile(path_here):
            return pathlib.Path(path_here)
    names = [f"configs/{file.name}" for file in folder.glob("*.py")]
    near = difflib.get_close_matches(path[-MAX_SHOWN:], names, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]}?" if near else "try configs/emoji_gift.py"
    raise UserError(f"--config={one_line(path)} is no file; {hint}")


def load_config(spec: str, program: str = "") -> ConfigDict:
    """Returns the locked config of FILE or FILE:variant, see `find_config`.

    Args: program: whose config it must be, see `parse_config`; "": any.
    Raises: UserError if there is no such file or variant, or it has no get_config.
    """
    path, _, variant = spec.partition(":")
    file = find_config(path)
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
    except (AttributeError, KeyError) as error:  # ml_collections' of unknown fields
        frames = traceback.extract_tb(error.__traceback__)[1:]  # from get_config on
        line = [f.lineno for f in frames if f.filename == frames[0].filename][-1]
        reason = one_line(error.args[0] if error.args else error)
        raise UserError(f"--config={path}, line {line}: {reason}") from error
    if not isinstance(cfg, ConfigDict):
        raise UserError(
            f"--config={path}: get_config returns a {type(cfg).__name__}; must be a "
            "ConfigDict"
        )
    check_kind(program, cfg, spec)
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
    if field == PROMPTS:
        node[name] = _prompts(f"config.{field}", value)
        return
    try:
        new = _json_texts(old, value) or _typed(old, value)
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


def _json_texts(old: Any, value: str) -> tuple[str, ...] | None:
    """Returns the texts of a JSON list, for a field of several; None if it is none."""
    if not isinstance(old, tuple) or not value.lstrip().startswith("["):
        return None
    try:
        texts = parse_json(value)
    except (ValueError, RecursionError):
        return None
    return tuple(texts) if all(isinstance(text, str) for text in texts) else None


def _prompts(field: str, value: str) -> tuple[str, ...]:
    """Returns one prompt, the whole value, or those of a JSON list."""
    if not value.lstrip().startswith("["):
        return (value,) if value.strip() not in ("", "()") else ()
    texts = _json_texts((), value)
    if texts is None:
        example = json.dumps([value[:MAX_SHOWN]], ensure_ascii=False)
        raise UserError(
            f"{field}={shown(value)} starts as a JSON list, but is no list of texts; "
            f"for one prompt that starts with [ write --{field}='{example}'"
        )
    return texts


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
