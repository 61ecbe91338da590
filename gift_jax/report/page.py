# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page of benchmark folders, with Markdown and PNG plots.

The page holds every table, plot and image from the start. An element's `data-KEY`
attributes list the choices under which it is shown; page.js hides the others.
"""

import json
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from gift_jax.benchmark.table import form
from gift_jax.report import images, markdown, plots, results
from gift_jax.report.results import Run
from gift_jax.report.view import View, gap_metrics

_HERE = pathlib.Path(__file__).resolve().parent


def write(
    runs: Sequence[Run],
    out: pathlib.Path,
    *,
    count: int = 8,
    metric: str = "",
    over: str = "",
) -> list[pathlib.Path]:
    """Writes the page, table.md and the plots of each run beside it; returns the paths.

    Everything is written aside and renamed at the end. The plots of the second run and
    those after it have its number in their names.

    Args: out: the page. count: images of each point. metric, over: what the page opens
      with and the plots show; "" for the first.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".report-") as name:
        aside = pathlib.Path(name)
        html = render(runs, count=count, metric=metric, over=over)
        (aside / out.name).write_text(html, encoding="utf-8")
        text = markdown.markdown(runs, metric, over)
        (aside / "table.md").write_text(text, encoding="utf-8")
        for i, run in enumerate(runs, 1):
            write_plots(run.data, aside, f"_{i}" if i > 1 else "", metric, over)
        paths = [file.replace(out.parent / file.name) for file in aside.iterdir()]
    return sorted(paths, key=lambda path: (path.name != out.name, path.name))


def write_plots(
    data, folder: pathlib.Path, suffix: str = "", metric: str = "", over: str = ""
) -> None:
    """Writes trajectories.png and, if there are gap ratios, tradeoff.png."""
    metrics, overs = results.metrics(data), results.overs(data)
    metric = metric if metric in metrics else metrics[0]
    plots.trajectories_png(data, metric, folder / f"trajectories{suffix}.png")
    if metric in gap_metrics(data):
        over = over if over in overs else overs[0]
        plots.tradeoff_png(data, metric, over, folder / f"tradeoff{suffix}.png")


def render(
    runs: Sequence[Run], *, count: int = 8, metric: str = "", over: str = ""
) -> str:
    """Returns the page's HTML; the same runs give the same page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=2)
    environment.filters["plain"] = _plain
    environment.filters["form"] = form
    return environment.get_template("page.html.j2").render(
        runs=[View(run, count, metric, over) for run in runs],
        count=count,
        columns=images.COLUMNS,
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((_HERE / "page.js").read_text(encoding="utf-8")),
    )


def _plain(value: Any) -> str:
    """Returns a setting as a reader would write it."""
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, dict | bool):
        return json.dumps(value)
    return "none" if value is None else str(value)
