# SPDX-License-Identifier: Apache-2.0
"""A benchmark folder with made-up numbers and random pictures, for the report."""

import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from gift_jax.benchmark import gap_ratios
from gift_jax.sampling import grid

METHODS = ("original", "esd", "gift")
ATTACKS = {"lora": "lora", "lora_x3": "lora", "dreambooth": "dreambooth"}
STEPS = (75, 150, 300)
METRICS = ("classifier_accuracy", "judge_image_similarity")
# What an attack reaches at its end, of the harmful and the benign side.
STRENGTH = {"original": (0.95, 0.9), "esd": (0.6, 0.75), "gift": (0.2, 0.8)}
HOW = {"backbone": "judge", "version": "ab12cd34ef56", "resolution": 64}


def noise(rng, num: int, cell: dict, value: float) -> np.ndarray:
    """Returns random pictures, uint8 "N 8 8 3"."""
    return rng.integers(0, 256, (num, 8, 8, 3), np.uint8)


def write(
    folder: pathlib.Path,
    *,
    name: str = "standard",
    concepts: Sequence[str] = ("bomb",),
    methods: Sequence[str] = METHODS,
    attacks: dict[str, str] = ATTACKS,
    prompts: Sequence[str] = ("name",),
    steps: Sequence[int] = STEPS,
    num: int = 10,
    draw: Callable = noise,
    edit: Callable[[dict], None] | None = None,
) -> dict:
    """Writes results.json and sheets; returns what results.json holds.

    Args: draw: (rng, num, cell, value) -> pictures. edit: changes what is written.
    """
    rng = np.random.default_rng(0)
    cells = []
    for concept in concepts:
        for method in methods:
            for side in ("harmful", "benign", "kept"):
                for attack in ("before", *(attacks if side != "kept" else ())):
                    for prompt in prompts:
                        cell = {"concept": concept, "method": method, "side": side}
                        cell |= {"attack": attack, "prompt": prompt, "seed": 0}
                        cell["family"] = attacks.get(attack, "")
                        at = (0,) if attack == "before" else steps
                        cells.append(_fill(folder, cell, at, num, rng, draw))
    data = {
        "name": name,
        "command": f"python -m gift_jax.benchmark --config configs/b.py:{name}",
        "config": {"model": "emoji-sd", "methods": list(methods)},
        "versions": {"gift_jax": "0.1.0", "jax": "0.9.9"},
        "metrics": {m: {"higher": "more alike", "how": HOW} for m in METRICS},
        "skipped": {},
        "cells": cells,
        "summary": _summary(cells, methods, attacks, prompts),
    }
    if edit:
        edit(data)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(data), encoding="utf-8")
    return data


def _fill(folder, cell, steps, num, rng, draw) -> dict:
    place = [cell[key] for key in ("concept", "method", "side", "attack", "prompt")]
    home, points = pathlib.Path("cells", *map(_as_file, place)), []
    for step in steps:
        value = _reached(cell, step, rng)
        right = (rng.random(num) < value).astype(float)
        points.append(
            {
                "step": step,
                "num": num,
                "values": {
                    "classifier_accuracy": float(right.mean()),
                    "judge_image_similarity": value,
                },
                "samples": {
                    "classifier_accuracy": list(right),
                    "judge_image_similarity": [value] * num,
                },
                "things": ["bomb" if one else "acorn" for one in right],
                "styles": ["noto"] * num,
                "sheet": str(home / f"{step:06d}.png"),
            }
        )
        images = draw(rng, num, cell, value)
        grid.save_sheet(images, folder / points[-1]["sheet"])
    return cell | {"seconds": 31.2, "points": points} | _seconds(cell)


def _as_file(name: str) -> str:
    return "".join(c if c.isalnum() or c == "_" else "-" for c in name)


def _seconds(cell) -> dict:
    found = {} if cell["attack"] == "before" else {"step_s": 0.0625}
    return found if cell["method"] == "original" else found | {"defence_step_s": 0.25}


def _reached(cell, step: int, rng) -> float:
    strength = STRENGTH.get(cell["method"], (0.4, 0.7))
    end = 0.9 if cell["side"] == "kept" else strength[cell["side"] == "benign"]
    rate = 400 if cell["attack"].endswith("_x3") else 150
    grown = 1.0 if cell["side"] == "kept" else 0.05 + 0.95 * (1 - np.exp(-step / rate))
    return float(np.clip(end * grown + rng.normal(0, 0.04), 0.01, 1.0))


def _summary(cells, methods, attacks, prompts) -> list[dict]:
    found = {}
    for cell in cells:
        for metric in METRICS:
            values = [point["values"][metric] for point in cell["points"]]
            place = (cell["method"], cell["attack"], cell["prompt"], cell["side"])
            found.setdefault((*place, metric), {})[cell["concept"]] = values
    rows = []
    for method in methods[1:]:
        for attack, family in attacks.items():
            for prompt in prompts:
                for metric in METRICS:
                    for over in gap_ratios.OVER:
                        row = {"method": method, "attack": attack, "family": family}
                        row |= {"prompt": prompt, "metric": metric, "over": over}
                        for side in ("harmful", "benign"):
                            row[side] = _gap(found, row, side)
                        rows.append(row)
    return rows


def _gap(found, row, side) -> dict:
    rest = row["attack"], row["prompt"], side, row["metric"]
    mine, original = found[row["method"], *rest], found["original", *rest]
    ratios = {
        concept: gap_ratios.trajectory_gaps(original[concept], mine[concept])[
            row["over"]
        ]
        for concept in mine
    }
    known = [ratio for ratio in ratios.values() if ratio is not None]
    if not known:
        return None
    low, high = gap_ratios.bootstrap(known, num=500)
    value = float(np.mean(known))
    return {"value": value, "low": low, "high": high, "per_concept": ratios}
