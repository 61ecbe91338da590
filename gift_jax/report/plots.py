# SPDX-License-Identifier: Apache-2.0
"""The page's plots as PNG, for papers."""

import pathlib
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gift_jax.benchmark import summary
from gift_jax.report import curves, results, tables

# Told apart without colours, too: colour, marker and dash go through periods of their
# own. The page's stylesheet has the same colours, and others for dark.
COLOURS = ("#0065a8", "#c8500a", "#00805c", "#a8448a", "#8a6800", "#2b8cc4", "#6b5b95")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
DASHES = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2), (3, 1.5))
INK = "#1c1d21"
_STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e0",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.parse_math": False,  # names come from configs
    "svg.hashsalt": "gift_jax",
}
_DPI = 200


class Look(NamedTuple):
    """How a method is drawn."""

    colour: str
    marker: str
    dash: tuple[float, ...]


def look(i: int) -> Look:
    """Returns the look of method number i; -1 is the original."""
    if i < 0:
        return Look(INK, "o", ())
    parts = (COLOURS, MARKERS[1:] + MARKERS[:1], DASHES)
    return Look(*(part[i % len(part)] for part in parts))


def _looks(data) -> dict[str, Look]:
    names = tables.defended(data)
    return {summary.ORIGINAL: look(-1)} | {
        name: look(i) for i, name in enumerate(names)
    }


def trajectories(data, metric: str, path: pathlib.Path) -> None:
    """Draws the metric against attack steps: a row for each attack, a column a side."""
    looks, lines = _looks(data), curves.curves(data, metric)
    lines = [line for line in lines if not line.concept]
    matches = [m for m in results.matches(data) if any(c.match == m for c in lines)]
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.6, 0.7 + 1.9 * max(1, len(matches))))
        axes = figure.subplots(
            max(1, len(matches)), 2, sharey=True, squeeze=False, sharex="row"
        )
        for row, match in zip(axes, matches, strict=False):
            for ax, side in zip(row, summary.SIDES, strict=True):
                ax.set_title(f"{results.match_label(data, match)}, {side}", loc="left")
                for line in lines:
                    if (line.match, line.side) == (match, side):
                        _draw_line(ax, line, looks[line.method])
            row[0].set_ylabel(metric)
        for ax in axes[-1]:
            ax.set_xlabel("attack steps")
        _legend(figure, looks, {line.method for line in lines})
        _save(figure, path)


def _draw_line(ax, line: curves.Curve, style: Look) -> None:
    steps = [p.step for p in line.points]
    ax.plot(
        steps,
        [p.value for p in line.points],
        **_marks(style, 3.5),
        **_line(style),
    )
    if all(p.n > 1 for p in line.points):
        low, high = ([getattr(p, end) for p in line.points] for end in ("low", "high"))
        ax.fill_between(steps, low, high, color=style.colour, alpha=0.12, linewidth=0)


def tradeoff(data, metric: str, over: str, path: pathlib.Path) -> None:
    """Draws the harmful gap against the benign gap: one point a method."""
    table, looks = tables.gap_table(data, metric, over), _looks(data)
    matches, names = results.matches(data), tables.defended(data)
    columns = min(3, max(1, len(matches)))
    rows = max(1, -(-len(matches) // columns))
    with rc_context(_STYLE):
        figure = Figure(figsize=(max(3.6, 2.5 * columns), 0.7 + 2.4 * rows))
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for ax, match in zip(axes.flat, matches, strict=False):
            ax.set_title(results.match_label(data, match), loc="left")
            for i, name in enumerate(names):
                pair = [table.columns[match, side][i] for side in summary.SIDES]
                if None not in pair:
                    _draw_point(ax, *pair, looks[name])
            ax.plot(0, 0, linestyle="", **_marks(looks[summary.ORIGINAL], 5))
            ax.update_datalim([(0, 1)])  # the best place is always in sight
            ax.autoscale_view()
        for ax in axes.flat[len(matches) :]:
            ax.set_visible(False)
        for ax in axes[:, 0]:
            ax.set_ylabel("harmful gap (1 is best)")
        for ax in axes.flat[max(0, len(matches) - columns) : len(matches)]:
            ax.set_xlabel("benign gap (0 is best)")
            ax.tick_params(labelbottom=True)  # below it may be nothing
        _legend(figure, looks, {summary.ORIGINAL, *names}, lines=False)
        _save(figure, path)


def _draw_point(ax, harmful, benign, style: Look) -> None:
    x, y = benign.value, harmful.value
    for low, high, is_x in (
        (benign.low, benign.high, True),
        (harmful.low, harmful.high, False),
    ):
        if low is not None and high is not None and low < high:
            ends = ((low, high), (y, y)) if is_x else ((x, x), (low, high))
            ax.plot(*ends, color=style.colour, linewidth=0.9, alpha=0.6)
    ax.plot(x, y, linestyle="", **_marks(style, 5.5))


def _marks(style: Look, size: float) -> dict[str, Any]:
    face = "white" if style.colour == INK else style.colour  # a ring for the original
    how = {"color": style.colour, "marker": style.marker, "markerfacecolor": face}
    return how | {"markersize": size}


def _line(style: Look) -> dict[str, Any]:
    return {"linewidth": 1.3, "dashes": style.dash or (None, None)}


def _legend(figure, looks, used, *, lines: bool = True) -> None:
    named = {name: style for name, style in looks.items() if name in used}
    handles = [
        Line2D(
            [],
            [],
            label=name,
            **_marks(style, 4),
            **(_line(style) if lines else {"linestyle": ""}),
        )
        for name, style in named.items()
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(named)))


def _save(figure, path: pathlib.Path) -> None:
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=_DPI, format="png", metadata={"Software": None})
