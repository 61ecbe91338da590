# SPDX-License-Identifier: Apache-2.0
"""Reading a benchmark's results.json, and what it names in which order."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from gift_jax.benchmark import summary
from gift_jax.runtime.errors import UserError

FILE = "results.json"
SIDES = ("harmful", "benign", "kept")
_VALUE = (int, float, type(None))
_TOP = {"name": str, "command": str, "config": dict, "versions": dict}
_TOP |= {"metrics": dict, "skipped": dict, "cells": list, "summary": list}
_MATCH = {"method": str, "attack": str, "family": str, "prompt": str}
_CELL = {**_MATCH, "concept": str, "side": str, "seed": int, "points": list}
_POINT = {"step": int, "num": int, "values": dict}
_MAYBE = {"samples": dict, "things": (list, type(None)), "styles": (list, type(None))}
_MAYBE |= {"sheet": (str, type(None))}
_TIMES = {"seconds": _VALUE, "step_s": _VALUE, "defence_step_s": _VALUE}
_GAP = {"metric": str, "over": str}
_SIDE = {"value": _VALUE, "low": _VALUE, "high": _VALUE, "per_concept": dict}


class Run(NamedTuple):
    """One benchmark folder: where it lies, what its results.json holds, its label."""

    folder: pathlib.Path
    data: dict[str, Any]
    label: str


class Match(NamedTuple):
    """An attack under one prompt. family: attacks that differ in the learning rate."""

    family: str
    attack: str
    prompt: str


def load_all(folders: Sequence[str]) -> list[Run]:
    """Returns the runs of benchmark folders, labelled by name.

    Raises: UserError naming the file that is missing, no JSON, or lacks a key.
    """
    paths = [pathlib.Path(folder) for folder in folders]
    datas = [load(path) for path in paths]
    names = [data["name"] for data in datas]
    labels = [
        name if names.count(name) == 1 else f"{name} ({path.resolve().name}, {i})"
        for i, (name, path) in enumerate(zip(names, paths, strict=True), 1)
    ]
    return [Run(*parts) for parts in zip(paths, datas, labels, strict=True)]


def load(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what a folder's results.json holds, checked."""
    path = folder / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{path}: no such file; RUN must be a folder that gift_jax.benchmark has "
            "finished"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    _check(path, data)
    return data


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _check(path: pathlib.Path, data: Any) -> None:
    _check_keys(path, "", data, _TOP)
    for name, metric in data["metrics"].items():
        _check_keys(path, f"metrics.{name}", metric, {"higher": str, "how": dict})
    for i, cell in enumerate(data["cells"]):
        place = f"cells[{i}]"
        _check_keys(path, place, cell, _CELL)
        _check_keys(path, place, cell, _there(cell, _TIMES))
        for j, point in enumerate(cell["points"]):
            _check_keys(path, f"{place}.points[{j}]", point, _POINT)
            _check_keys(path, f"{place}.points[{j}]", point, _there(point, _MAYBE))
            _check_numbers(path, f"{place}.points[{j}].values", point["values"])
    for i, row in enumerate(data["summary"]):
        _check_keys(path, f"summary[{i}]", row, _MATCH | _GAP)
        for side in ("harmful", "benign"):
            _check_keys(path, f"summary[{i}]", row, {side: (dict, type(None))})
            if row[side] is not None:
                place = f"summary[{i}].{side}"
                _check_keys(path, place, row[side], _SIDE)
                _check_numbers(path, f"{place}.per_concept", row[side]["per_concept"])
    points = [point for cell in data["cells"] for point in cell["points"]]
    if not any(point["values"] for point in points):
        raise UserError(f"{path}: no cell has a value; nothing has been measured")


def _there(value: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    return {key: kind for key, kind in wanted.items() if key in value}


def _check_numbers(path, where: str, value: dict[str, Any]) -> None:
    _check_keys(path, where, value, dict.fromkeys(value, _VALUE))


def _check_keys(path, where: str, value: Any, wanted: dict[str, Any]) -> None:
    place = f", {where}," if where else ""
    if not isinstance(value, dict):
        raise UserError(f"{path}{place} must be an object, not {value!r:.40}")
    for key, kind in wanted.items():
        if key not in value:
            raise UserError(
                f"{path}{place} has no key {key!r}; another version wrote it, or "
                "somebody changed it: run gift_jax.benchmark on that folder again"
            )
        if not isinstance(value[key], kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            names = " or ".join(k.__name__ for k in kinds)
            got = repr(value[key])[:40]
            raise UserError(f"{path}{place} has {key}={got}; must be of type {names}")


def methods(data) -> list[str]:
    """Returns the methods in order, the original first."""
    named = [row["method"] for row in (*data["cells"], *data["summary"])]
    order = list(dict.fromkeys(named))
    return sorted(order, key=lambda name: name != summary.ORIGINAL)


def concepts(data) -> list[str]:
    """Returns the concepts in order."""
    return list(dict.fromkeys(cell["concept"] for cell in data["cells"]))


def matches(data) -> list[Match]:
    """Returns every attack under each of its prompts, families and attacks together."""
    rows = [
        r for r in (*data["cells"], *data["summary"]) if r["attack"] != summary.BEFORE
    ]
    found = dict.fromkeys(Match(r["family"], r["attack"], r["prompt"]) for r in rows)
    families = list(dict.fromkeys(match.family for match in found))
    attacks = list(dict.fromkeys(match.attack for match in found))
    return sorted(
        found, key=lambda m: (families.index(m.family), attacks.index(m.attack))
    )


def prompts(data) -> list[str]:
    """Returns the prompts of attacks in order."""
    return list(dict.fromkeys(match.prompt for match in matches(data)))


def match_label(data, match: Match) -> str:
    """Returns the attack's name, with its prompt where the run has several."""
    several = len(prompts(data)) > 1
    return f"{match.attack} ({match.prompt})" if several else match.attack


def metrics(data) -> list[str]:
    """Returns the metrics that were measured: those with gap ratios first."""
    with_gaps = dict.fromkeys(row["metric"] for row in data["summary"])
    points = [point for cell in data["cells"] for point in cell["points"]]
    found = dict.fromkeys(name for point in points for name in point["values"])
    return list(with_gaps | found)
