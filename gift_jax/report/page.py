# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page of benchmark folders, with Markdown and PNG plots."""

import json
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jinja2

from gift_jax.report import curves, markdown, pictures, plots, results, tables

_HERE = pathlib.Path(__file__).resolve().parent
_SCRIPTS = ("state.js", "figures.js", "sections.js", "pictures.js")


def write(
    runs: Sequence[results.Run],
    out: pathlib.Path,
    *,
    count: int = 8,
    metric: str = "",
    over: str = "",
) -> list[pathlib.Path]:
    """Writes the page, table.md and the plots of each run beside it; returns the paths.

    Everything is written aside and renamed at the end. The plots of the second run and
    those after it have its number in their names.

    Args: out: the page. count: pictures of each point. metric, over: what the page
      opens with and the plots show; "" for the first.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".report-") as name:
        aside = pathlib.Path(name)
        html = render(runs, count=count, metric=metric, over=over)
        (aside / out.name).write_text(html, encoding="utf-8")
        text = markdown.markdown(runs, metric, over)
        (aside / "table.md").write_text(text, encoding="utf-8")
        for i, run in enumerate(runs, 1):
            _plot(run.data, aside, f"_{i}" if i > 1 else "", metric, over)
        made = [file.replace(out.parent / file.name) for file in aside.iterdir()]
    return sorted(made, key=lambda path: (path.name != out.name, path.name))


def _plot(data, folder: pathlib.Path, suffix: str, metric: str, over: str) -> None:
    metric = metric if metric in results.metrics(data) else results.metrics(data)[0]
    plots.trajectories(data, metric, folder / f"trajectories{suffix}.png")
    parts = tables.overs(data)
    if any(row["metric"] == metric for row in data["summary"]):
        over = over if over in parts else parts[0]
        plots.tradeoff(data, metric, over, folder / f"tradeoff{suffix}.png")


def render(
    runs: Sequence[results.Run], *, count: int = 8, metric: str = "", over: str = ""
) -> str:
    """Returns the page's HTML; the same runs give the same page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=2)
    environment.filters["plain"] = _plain
    defended = dict.fromkeys(m for run in runs for m in tables.defended(run.data))
    data = {
        "looks": list(defended),  # a method looks the same in every run
        "start": {"metric": metric, "over": over},
        "pictures": count,
        "columns": pictures.COLUMNS,
        "runs": [_run_json(run, count) for run in runs],
    }
    return environment.get_template("page.html.j2").render(
        data=data,
        runs=[_facts(run) for run in runs],
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        scripts=[(_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS],
    )


def _plain(value: Any) -> str:
    """Returns a setting as a reader would write it."""
    if isinstance(value, list):
        return ", ".join(_plain(one) for one in value)
    if isinstance(value, dict | bool):
        return json.dumps(value)
    return "none" if value is None else str(value)


def _facts(run: results.Run) -> dict[str, Any]:
    """What the template itself writes of a run."""
    data = run.data
    points = [point for cell in data["cells"] for point in cell["points"]]
    nums = sorted({point["num"] for point in points})
    counts = {
        "concept": len(results.concepts(data)),
        "method": len(results.methods(data)),
        "attack": len({match.attack for match in results.matches(data)}),
        "seed": len({cell["seed"] for cell in data["cells"]}),
    }
    hours = sum(cell.get("seconds") or 0.0 for cell in data["cells"]) / 3600
    keys = ("name", "command", "config", "versions", "metrics", "skipped")
    facts = {key: data[key] for key in keys}
    return facts | {
        "label": run.label,
        "counts": counts,
        "nums": "-".join(str(n) for n in dict.fromkeys((nums[0], nums[-1])))
        if nums
        else "0",
        "cells": len(data["cells"]),
        "time": f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min",
        "seconds": tables.seconds(data),
        "concepts": results.concepts(data),
    }


def _run_json(run: results.Run, count: int) -> dict[str, Any]:
    """What the page's scripts draw from."""
    data = run.data
    matches = results.matches(data)
    chosen = [""] + (results.concepts(data) if len(results.concepts(data)) > 1 else [])
    with_gaps = dict.fromkeys(row["metric"] for row in data["summary"])
    parts = tables.overs(data)
    return {
        "label": run.label,
        "methods": results.methods(data),
        "defended": tables.defended(data),
        "concepts": results.concepts(data),
        "prompts": results.prompts(data),
        "overs": parts,
        "matches": [
            m._asdict() | {"label": results.match_label(data, m)} for m in matches
        ],
        "metrics": [
            {"name": m, "higher": data["metrics"].get(m, {}).get("higher", "")}
            for m in results.metrics(data)
        ],
        "gaps": {
            metric: {
                over: {c: _gap_json(data, metric, over, c) for c in chosen}
                for over in parts
            }
            for metric in with_gaps
        },
        "before": {
            metric: {c: _before_json(data, metric, c) for c in chosen}
            for metric in results.metrics(data)
        },
        "curves": {
            metric: _curves_json(data, metric, matches, chosen)
            for metric in results.metrics(data)
        },
        "points": pictures.embedded(run, count),
    }


def _gap_json(data, metric: str, over: str, concept: str) -> dict[str, Any]:
    table = tables.gap_table(data, metric, over, concept)
    numbers = {"harmful": [], "benign": []}  # of each match, in order
    for (_, side), column in table.columns.items():
        numbers[side].append(_column(column))
    worst: dict[str, dict[str, Any]] = {}
    for (prompt, family), column in table.worst.items():
        worst.setdefault(prompt, {})[family] = _column(column)
    return numbers | {"worst": worst}


def _before_json(data, metric: str, concept: str) -> list[dict[str, Any]]:
    return [
        {"side": side, "prompt": prompt, "numbers": _column(column)}
        for (side, prompt), column in tables.before_table(data, metric, concept).items()
    ]


def _curves_json(data, metric: str, matches, chosen) -> list[dict[str, Any]]:
    return [
        {
            "match": matches.index(line.match),
            "side": line.side,
            "method": line.method,
            "concept": line.concept,
            "points": [
                [p.step, *(round(v, 5) for v in (p.value, p.low, p.high)), p.n]
                for p in line.points
            ],
        }
        for line in curves.curves(data, metric)
        if line.concept in chosen
    ]


def _column(numbers: tables.Numbers) -> list[dict[str, Any] | None]:
    return [number and number.as_json() for number in numbers]
