# SPDX-License-Identifier: Apache-2.0
"""Reads a benchmark's results.json, and names what it holds in order.

A published folder holds summary.json instead, with the same keys and less in each cell.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from gift_jax.benchmark import gap_ratios, summary
from gift_jax.runtime.errors import UserError

FILE, PUBLISHED = "results.json", "summary.json"
_VALUE = (int, float, type(None))
_TOP = {"name": str, "command": str, "config": dict, "versions": dict}
_TOP |= {"metrics": dict, "skipped": dict, "cells": list, "summary": list}
_TOP |= {"headline": list}
_MATCH = {"method": str, "attack": str, "family": str, "prompt": str}
_CELL = {**_MATCH, "concept": str, "side": str, "seed": int, "points": list}
_POINT = {"step": int, "num": int, "values": dict}
_SHEET = {"sheet": (str, type(None))}
_TIMES = {"seconds": _VALUE, "step_s": _VALUE, "defense_step_s": _VALUE}
_GAP = {"metric": str, "over": str}
_SIDE = {"value": _VALUE, "low": _VALUE, "high": _VALUE, "per_concept": dict}
_HEAD = {"method": str, "metric": str, "worst": (dict, type(None)), "mean": _VALUE}
_WORST = {"value": _VALUE, "step": int, "seed": int}
_WORST |= {"attack": str, "prompt": str, "concept": str}


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
    """Returns the runs of benchmark folders, labeled by name.

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
    """Returns what a folder's results.json or summary.json holds, checked."""
    path = folder / FILE
    if not path.exists() and (folder / PUBLISHED).exists():
        path = folder / PUBLISHED
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
    if path.name == PUBLISHED:
        _expand(path, data)
    _check(path, data)
    return data


def _expand(path: pathlib.Path, data: Any) -> None:
    """Makes points of the columns that a published cell has."""
    kinds = {"steps": list, "nums": list, "values": dict}
    _check_keys(path, "", data, {"cells": list})
    for i, cell in enumerate(data["cells"]):
        _check_keys(path, f"cells[{i}]", cell, kinds)
        columns = cell.pop("values")
        _check_keys(path, f"cells[{i}].values", columns, dict.fromkeys(columns, list))
        rows = zip(*columns.values(), strict=False)
        values = [dict(zip(columns, row, strict=True)) for row in rows]
        cell["points"] = [
            {"step": step, "num": num, "values": row}
            for step, num, row in zip(
                cell.pop("steps"), cell.pop("nums"), values, strict=False
            )
        ]


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _check(path: pathlib.Path, data: Any) -> None:
    _check_keys(path, "", data, _TOP)
    for name, metric in data["metrics"].items():
        _check_keys(
            path, f"metrics.{name}", metric, {"higher_means": str, "provenance": dict}
        )
    for i, cell in enumerate(data["cells"]):
        place = f"cells[{i}]"
        _check_keys(path, place, cell, _CELL)
        _check_keys(path, place, cell, _present(cell, _TIMES))
        for j, point in enumerate(cell["points"]):
            _check_keys(path, f"{place}.points[{j}]", point, _POINT)
            _check_keys(path, f"{place}.points[{j}]", point, _present(point, _SHEET))
            _check_numbers(path, f"{place}.points[{j}].values", point["values"])
    for i, row in enumerate(data["summary"]):
        _check_keys(path, f"summary[{i}]", row, _MATCH | _GAP)
        for side in ("harmful", "benign"):
            _check_keys(path, f"summary[{i}]", row, {side: (dict, type(None))})
            if row[side] is not None:
                place = f"summary[{i}].{side}"
                _check_keys(path, place, row[side], _SIDE)
                _check_numbers(path, f"{place}.per_concept", row[side]["per_concept"])
    for i, row in enumerate(data["headline"]):
        _check_keys(path, f"headline[{i}]", row, _HEAD)
        if row["worst"] is not None:
            _check_keys(path, f"headline[{i}].worst", row["worst"], _WORST)
    points = [point for cell in data["cells"] for point in cell["points"]]
    if not any(point["values"] for point in points):
        raise UserError(f"{path}: no cell has a value; nothing has been measured")


def _present(value: dict[str, Any], kinds: dict[str, Any]) -> dict[str, Any]:
    return {key: kind for key, kind in kinds.items() if key in value}


def _check_numbers(path, where: str, value: dict[str, Any]) -> None:
    _check_keys(path, where, value, dict.fromkeys(value, _VALUE))


def _check_keys(path, where: str, value: Any, kinds: dict[str, Any]) -> None:
    place = f", {where}," if where else ""
    if not isinstance(value, dict):
        raise UserError(f"{path}{place} must be an object, not {value!r:.40}")
    for key, kind in kinds.items():
        if key not in value:
            raise UserError(
                f"{path}{place} has no key {key!r}; another version wrote it, or "
                "somebody changed it: run gift_jax.benchmark on that folder again"
            )
        if not isinstance(value[key], kind):
            several = kind if isinstance(kind, tuple) else (kind,)
            names = " or ".join(k.__name__ for k in several)
            text = repr(value[key])[:40]
            raise UserError(f"{path}{place} has {key}={text}; must be of type {names}")


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
    rows = (*data["cells"], *data["summary"])
    all_matches = dict.fromkeys(
        Match(row["family"], row["attack"], row["prompt"])
        for row in rows
        if row["attack"] != summary.BEFORE
    )
    families = list(dict.fromkeys(match.family for match in all_matches))
    attacks = list(dict.fromkeys(match.attack for match in all_matches))
    return sorted(
        all_matches, key=lambda m: (families.index(m.family), attacks.index(m.attack))
    )


def bounds(data) -> set[str]:
    """Returns the attacks that no defense can stop, which count in no worst case."""
    return {cell["attack"] for cell in data["cells"] if cell.get("is_bound")}


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
    measured = dict.fromkeys(name for point in points for name in point["values"])
    return list(with_gaps | measured)


def overs(data) -> list[str]:
    """Returns the parts of a trajectory that there are gap ratios over, in order."""
    names = dict.fromkeys(row["over"] for row in data["summary"])
    order = gap_ratios.OVER
    return sorted(names, key=lambda o: order.index(o) if o in order else len(order))


def sides(data) -> list[str]:
    """Returns the sides that have cells, in order."""
    names = {cell["side"] for cell in data["cells"]}
    return [side for side in summary.SIDES if side in names]
