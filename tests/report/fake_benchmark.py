# SPDX-License-Identifier: Apache-2.0
"""A benchmark folder with made-up numbers and random images, for the report."""

import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from gift_jax.benchmark import summary
from gift_jax.sampling import grid

METHODS = ("original", "esd", "gift")
ATTACKS = {"lora": "lora", "lora_x3": "lora", "dreambooth": "dreambooth"}
METRICS = ("classifier_accuracy", "judge_image_similarity")
# What an attack reaches at its end, of the harmful and the benign side.
STRENGTH = {"original": (0.95, 0.9), "esd": (0.6, 0.75), "gift": (0.2, 0.8)}
PROVENANCE = {"backbone": "judge", "version": "ab12cd34ef56", "resolution": 64}


def write(
    folder: pathlib.Path,
    *,
    name: str = "standard",
    concepts: Sequence[str] = ("bomb",),
    methods: Sequence[str] = METHODS,
    attacks: dict[str, str] = ATTACKS,
    prompts: Sequence[str] = ("name",),
    steps: Sequence[int] = (75, 150),
    num: int = 10,
    edit: Callable[[dict], None] | None = None,
) -> dict:
    """Writes results.json and sheets; returns what results.json holds.

    Sample i of a sheet is gray of 20 times i. Args: edit: changes what is written.
    """
    rng = np.random.default_rng(0)
    cells = []
    for concept in concepts:
        for method in methods:
            for side in summary.SIDES:
                attacked = attacks if side in summary.ATTACKED_SIDES else ()
                for attack in (summary.BEFORE, *attacked):
                    for prompt in prompts:
                        cell = {"concept": concept, "method": method, "side": side}
                        cell |= {"attack": attack, "prompt": prompt, "seed": 0}
                        cell["family"] = attacks.get(attack, "")
                        taken = steps if cell["family"] else (0,)
                        cells.append(_fill(folder, cell, taken, num, rng))
    metric = {"higher_means": "more alike", "provenance": PROVENANCE}
    data = {
        "name": name,
        "command": f"python -m gift_jax.benchmark --config configs/b.py:{name}",
        "config": {"model": "emoji-sd", "methods": list(methods)},
        "versions": {"gift_jax": "0.1.0", "jax": "0.9.9"},
        "metrics": dict.fromkeys(METRICS, metric),
        "skipped": {},
        "cells": cells,
        "summary": summary.summarize(cells, METRICS),
        "headline": summary.headline(cells, METRICS[0]),
    }
    if edit:
        edit(data)
    (folder / "results.json").write_text(json.dumps(data), encoding="utf-8")
    return data


def _fill(folder, cell, steps, num, rng) -> dict:
    """Writes a cell's sheets; returns it as results.json has it."""
    place = [cell[key] for key in ("concept", "method", "side", "attack", "prompt")]
    home = pathlib.Path("cells", *("".join(filter(str.isalnum, p)) for p in place))
    grays = 20 * np.arange(num, dtype=np.uint8).reshape(-1, 1, 1, 1)
    points = []
    for step in steps:
        value = _reached(cell, step, rng)
        right = (rng.random(num) < value).astype(float)
        point = {"step": step, "num": num, "sheet": str(home / f"{step:06d}.png")}
        accuracy = max(float(right.mean()), 0.1)
        point["values"] = dict(zip(METRICS, (accuracy, value), strict=True))
        labels = ["bomb" if one else "acorn" for one in right]
        points.append(point)
        marks = {METRICS[0]: list(right), METRICS[1]: [value] * num, "labels": labels}
        images = np.broadcast_to(grays, (num, 8, 8, 3))
        grid.save_sheet(images, folder / point["sheet"])
        marks_file = (folder / point["sheet"]).with_suffix(".json")
        marks_file.write_text(json.dumps(marks))
    times = {"seconds": 31.2}
    if cell["family"]:
        times["step_s"] = 0.0625
    if cell["method"] != summary.ORIGINAL:
        times["defense_step_s"] = 0.25
    return cell | times | {"points": points}


def _reached(cell, step: int, rng) -> float:
    strength = STRENGTH.get(cell["method"], (0.4, 0.7))
    retained = cell["side"] == summary.RETAINED
    end = 0.9 if retained else strength[cell["side"] == summary.BENIGN]
    rate = 400 if cell["attack"].endswith("_x3") else 150
    grown = 1.0 if retained else 0.05 + 0.95 * (1 - np.exp(-step / rate))
    return float(np.clip(end * grown + rng.normal(0, 0.04), 0.01, 1.0))
