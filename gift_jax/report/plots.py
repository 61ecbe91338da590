# SPDX-License-Identifier: Apache-2.0
"""The report's plots: PNG files for papers, and inline SVG for the page."""

import io
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from gift_jax.benchmark import summary
from gift_jax.report import results, tables, trajectories
from gift_jax.report.results import Match
from gift_jax.report.svg import COLORS, INK, PAPER, RULE, SOFT, inline_svg

# A method is recognized without colors, too: color, marker and dash go through periods
# of their own.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
DASHES = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2), (3, 1.5))
_STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titlecolor": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.parse_math": False,  # names come from configs
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "gift_jax",
}
_DPI = 150
_PALETTE = 128  # colors of a PNG


class Look(NamedTuple):
    """How a method is drawn."""

    color: str
    marker: str
    dash: tuple[float, ...]


def looks(data) -> dict[str, Look]:
    """Returns {method: its look}, the original's first."""
    parts = (COLORS, MARKERS[1:] + MARKERS[:1], DASHES)
    return {summary.ORIGINAL: Look(INK, "o", ())} | {
        name: Look(*(part[i % len(part)] for part in parts))
        for i, name in enumerate(tables.defended(data))
    }


# ---- figures of all attacks, as PNG


def trajectories_png(data, metric: str, path: pathlib.Path) -> None:
    """Draws the metric against attack steps: a row for each attack, a column a side."""
    lines = _means(data, metric)
    matches = [m for m in results.matches(data) if any(c.match == m for c in lines)]
    rows = max(1, len(matches))
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.6, 0.7 + 1.9 * rows))
        axes = figure.subplots(rows, 2, sharey=True, squeeze=False, sharex="row")
        for row, match in zip(axes, matches, strict=False):
            label = results.match_label(data, match)
            _draw_match(row, lines, match, looks(data), f"{label}, ")
            row[0].set_ylabel(metric)
        for ax in axes[-1]:
            ax.set_xlabel("attack steps")
        _legend(figure, looks(data), {line.method for line in lines})
        _save_png(figure, path)


def tradeoff_png(data, metric: str, over: str, path: pathlib.Path) -> None:
    """Draws the harmful gap against the benign gap: one point a method."""
    columns = tables.gap_columns(data, metric, over)
    matches = results.matches(data)
    across = min(3, max(1, len(matches)))
    rows = max(1, -(-len(matches) // across))
    with rc_context(_STYLE):
        figure = Figure(figsize=(max(3.6, 2.5 * across), 0.7 + 2.4 * rows))
        axes = figure.subplots(rows, across, sharex=True, sharey=True, squeeze=False)
        for i, (ax, match) in enumerate(zip(axes.flat, matches, strict=False)):
            ax.set_title(results.match_label(data, match), loc="left")
            _draw_tradeoff(ax, data, columns[2 * i : 2 * i + 2])
        for ax in axes.flat[len(matches) :]:
            ax.set_visible(False)
        for ax in axes[:, 0]:
            ax.set_ylabel("harmful gap (1 is best)")
        for ax in axes.flat[max(0, len(matches) - across) : len(matches)]:
            ax.set_xlabel("benign gap (0 is best)")
            ax.tick_params(labelbottom=True)  # below it may be nothing
        names = {summary.ORIGINAL, *tables.defended(data)}
        _legend(figure, looks(data), names, with_lines=False)
        _save_png(figure, path)


# ---- one attack each, as SVG


def trajectory_svgs(data, metric: str) -> dict[Match, str]:
    """Returns each attack's panels of `trajectories_png`, with one scale for all."""
    lines = _means(data, metric)
    ends = [x for line in lines for p in line.points for x in (p.low, p.high)]
    svgs = {}
    with rc_context(_STYLE):
        for match in results.matches(data):
            if not any(line.match == match for line in lines):
                continue
            figure = Figure(figsize=(5.6, 2.1), facecolor="none")
            row = figure.subplots(1, 2, sharey=True)
            figure.subplots_adjust(0.09, 0.2, 0.99, 0.89, wspace=0.08)
            _draw_match(row, lines, match, looks(data))
            row[0].set_ylim(*_padded(min(ends), max(ends)))
            row[0].set_ylabel(metric)
            for ax in row:
                ax.set_xlabel("attack steps")
            label = f"{metric}, {results.match_label(data, match)}"
            svgs[match] = inline_svg(figure, label)
    return svgs


def tradeoff_svgs(data, metric: str, over: str) -> dict[Match, str]:
    """Returns each attack's panel of `tradeoff_png`, with one scale for all."""
    columns = tables.gap_columns(data, metric, over)
    numbers = [[n for c in columns[side::2] for n in c.numbers if n] for side in (0, 1)]
    svgs = {}
    with rc_context(_STYLE):
        for i, match in enumerate(results.matches(data)):
            figure = Figure(figsize=(2.9, 2.7), facecolor="none")
            ax = figure.subplots()
            figure.subplots_adjust(0.18, 0.16, 0.97, 0.96)
            _draw_tradeoff(ax, data, columns[2 * i : 2 * i + 2])
            ax.set_ylim(*_padded(*_range(numbers[0], 0, 1)))
            ax.set_xlim(*_padded(*_range(numbers[1], 0, 0)))
            ax.set_xlabel("benign gap (0 is best)")
            ax.set_ylabel("harmful gap (1 is best)")
            label = f"{metric}, {over} gap, {results.match_label(data, match)}"
            svgs[match] = inline_svg(figure, label)
    return svgs


def swatches(data) -> list[str]:
    """Returns a piece of each method's line, in the order of `results.methods`."""
    svgs = []
    with rc_context(_STYLE):
        for method in results.methods(data):
            figure = Figure(figsize=(0.4, 0.16), facecolor="none")
            look = looks(data)[method]
            line = ([0.05, 0.5, 0.95], [0.5] * 3)
            figure.add_artist(
                Line2D(*line, markevery=[1], **_marks(look, 4), **_line(look))
            )
            svgs.append(inline_svg(figure, ""))
    return svgs


# ---- what both are made of


def _means(data, metric: str) -> list[trajectories.Curve]:
    return [line for line in trajectories.curves(data, metric) if not line.concept]


def _draw_match(row, lines, match: Match, styles: dict[str, Look], title: str = ""):
    """Draws the trajectories of one attack: harmful left, benign right."""
    for ax, side in zip(row, summary.ATTACKED_SIDES, strict=True):
        ax.set_title(f"{title}{side}", loc="left")
        for line in lines:
            if (line.match, line.side) == (match, side):
                _draw_line(ax, line, styles[line.method], _gid(styles, line.method))


def _draw_line(ax, line: trajectories.Curve, look: Look, gid: str) -> None:
    steps = [p.step for p in line.points]
    values = [p.value for p in line.points]
    ax.plot(steps, values, gid=gid, **_marks(look, 3.5), **_line(look))
    if all(p.n > 1 for p in line.points):
        low, high = ([getattr(p, end) for p in line.points] for end in ("low", "high"))
        band = {"color": look.color, "alpha": 0.12, "linewidth": 0}
        ax.fill_between(steps, low, high, gid=gid, **band)


def _draw_tradeoff(ax, data, columns: Sequence[tables.Column]) -> None:
    """Draws one attack's methods. columns: its harmful and its benign one."""
    styles = looks(data)
    ax.axhline(0, color=SOFT, linewidth=0.6, dashes=(2, 3))
    ax.axvline(0, color=SOFT, linewidth=0.6, dashes=(2, 3))
    ax.plot(0, 1, "o", color=SOFT, markerfacecolor="none", markersize=10)  # the best
    harmful, benign = (column.numbers for column in columns)
    for i, name in enumerate(tables.defended(data)):
        if harmful[i] and benign[i]:
            _draw_point(ax, harmful[i], benign[i], styles[name], _gid(styles, name))
    gid = _gid(styles, summary.ORIGINAL)
    ax.plot(0, 0, linestyle="", gid=gid, **_marks(styles[summary.ORIGINAL], 5))
    ax.autoscale_view()


def _draw_point(ax, harmful, benign, look: Look, gid: str) -> None:
    x, y = benign.value, harmful.value
    whiskers = {"color": look.color, "linewidth": 0.9, "alpha": 0.6, "gid": gid}
    if benign.low is not None and benign.high is not None:
        ax.plot((benign.low, benign.high), (y, y), **whiskers)
    if harmful.low is not None and harmful.high is not None:
        ax.plot((x, x), (harmful.low, harmful.high), **whiskers)
    ax.plot(x, y, linestyle="", gid=gid, **_marks(look, 5.5))


def _gid(styles: dict[str, Look], method: str) -> str:
    return f"method{list(styles).index(method)}"


def _marks(look: Look, size: float) -> dict[str, Any]:
    face = PAPER if look.color == INK else look.color  # a ring for the original
    style = {"color": look.color, "marker": look.marker, "markerfacecolor": face}
    return style | {"markersize": size}


def _line(look: Look) -> dict[str, Any]:
    return {"linewidth": 1.3, "dashes": look.dash or (None, None)}


def _range(numbers: Iterable[tables.Number], *others: float) -> tuple[float, float]:
    ends = [x for n in numbers for x in (n.value, n.low, n.high) if x is not None]
    return min(*ends, *others), max(*ends, *others, min(others) + 0.2)


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def _legend(figure, styles: dict[str, Look], names, *, with_lines: bool = True) -> None:
    handles = [
        Line2D(
            [],
            [],
            label=name,
            **_marks(look, 4),
            **(_line(look) if with_lines else {"linestyle": ""}),
        )
        for name, look in styles.items()
        if name in names
    ]
    columns = min(4, len(handles))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)


def _save_png(figure, path: pathlib.Path) -> None:
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    file = io.BytesIO()
    figure.savefig(file, dpi=_DPI, format="png", facecolor="white")
    image = Image.open(file).convert("RGB").quantize(_PALETTE)  # a third of the bytes
    image.save(path, format="png", optimize=True)
