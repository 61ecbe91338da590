# SPDX-License-Identifier: Apache-2.0
"""Turns benchmark folders into one page that opens anywhere.

Reads each RUN's results.json and sheets, and writes
  index.html        one self-contained page: tables, plots and images with choices
  table.md          its tables
  trajectories.png  what attacks reach after each step
  tradeoff.png      what each defense costs attackers and honest users
into RUN/report/ of the first RUN, or beside FILE.html. Several RUNs share the page,
which has a choice of them; the plots of the second are trajectories_2.png and so on.

With --publish DIR, writes there what is worth keeping of one RUN, under 1 MB:
summary.json, config.json, table.md, the plots and grid.webp. A published folder is a
RUN as well. With --compare, prints how the gap ratios of two methods differ, paired by
concept; the methods may be of different RUNs.

examples:
  python -m gift_jax.report runs/benchmark
  python -m gift_jax.report runs/benchmark --images 4 --over peak
  python -m gift_jax.report runs/one runs/two --out both.html
  python -m gift_jax.report runs/benchmark --publish docs/results/benchmark
  python -m gift_jax.report runs/benchmark --compare gift gift_gate --over final
"""

import argparse
import pathlib
import sys

from absl import logging

from gift_jax.report import results
from gift_jax.runtime import cli
from gift_jax.runtime.errors import UserError, at_least, choice

_LARGE = 50e6  # bytes of a page


def _parser() -> argparse.ArgumentParser:
    p = cli.parser(__doc__, "report")
    p.add_argument("runs", nargs="+", metavar="RUN", help="a folder with results.json")
    p.add_argument("--out", metavar="FILE.html", help="(default RUN/report/index.html)")
    p.add_argument("--publish", metavar="DIR", help="write a summary of RUN there")
    p.add_argument(
        "--compare",
        nargs=2,
        metavar=("METHOD", "METHOD"),
        help="print the second one's gap ratios minus the first one's",
    )
    p.add_argument(
        "--images",
        type=int,
        default=8,
        metavar="N",
        help="embed the first N samples of each point, 0 for none (default 8)",
    )
    p.add_argument(
        "--metric",
        default="",
        help="to open with, and of the plots (default: the first with gap ratios)",
    )
    p.add_argument(
        "--over",
        default="",
        help="part of the trajectory, likewise: mean, peak or final (default: the "
        "first)",
    )
    p.add_argument(
        "--concept", default="", help="of --publish's grid (default: the first)"
    )
    return p


def _check(args, runs: list[results.Run]) -> None:
    at_least("--images", args.images, 0)
    for flag, value, names in (
        ("--metric", args.metric, results.metrics),
        ("--over", args.over, results.overs),
        ("--concept", args.concept, results.concepts),
    ):
        choices = dict.fromkeys(name for run in runs for name in names(run.data))
        if value:
            choice(flag, value, tuple(choices))
    methods = dict.fromkeys(
        row["method"] for run in runs for row in run.data["summary"]
    )
    for method in args.compare or ():
        choice("--compare", method, tuple(methods))
    if args.out and not args.out.endswith((".html", ".htm")):
        raise UserError(
            f"--out={args.out} must end in .html; try --out={args.out}.html"
        )
    if args.out and pathlib.Path(args.out).is_dir():
        raise UserError(f"--out={args.out} is a folder; must be a file")
    if args.publish and len(runs) > 1:
        raise UserError(
            f"--publish={args.publish} takes one RUN; give each its own DIR"
        )


def main(argv=None) -> int:
    """Runs the command line; returns the exit code.

    Raises: UserError for a mistake in the flags or a results.json.
    """
    args = _parser().parse_args(argv)
    runs = results.load_all(args.runs)
    _check(args, runs)
    if args.compare:
        _compare(args, runs)
    elif args.publish:
        _publish(args, runs[0])
    else:
        _write_page(args, runs)
    return 0


def _compare(args, runs: list[results.Run]) -> None:
    from gift_jax.report import markdown

    rows = [row for run in runs for row in run.data["summary"]]
    metric = args.metric or rows[0]["metric"]
    over = args.over or rows[0]["over"]
    print(markdown.comparison(runs, *args.compare, metric, over), end="")


def _publish(args, run: results.Run) -> None:
    from gift_jax.report import publish  # matplotlib takes a while

    out = pathlib.Path(args.publish)
    options = {"metric": args.metric, "over": args.over, "concept": args.concept}
    try:
        paths = publish.publish(run, out, **options)
    except OSError as error:
        raise UserError(f"--publish={out} cannot be written: {error}") from error
    total = _log_sizes(paths)
    if total > publish.LIMIT:
        logging.warning("%.1f MB are more than a repository should hold", total / 1e6)


def _write_page(args, runs: list[results.Run]) -> None:
    from gift_jax.report import page

    out = pathlib.Path(args.out or runs[0].folder / "report" / "index.html")
    options = {"count": args.images, "metric": args.metric, "over": args.over}
    try:
        paths = page.write(runs, out, **options)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error}") from error
    _log_sizes(paths)
    if out.stat().st_size > _LARGE:
        logging.info("a page that large opens slowly; --images 4 makes it smaller")


def _log_sizes(paths: list[pathlib.Path]) -> int:
    """Logs what was written; returns the bytes of all."""
    sizes = [path.stat().st_size for path in paths]
    for path, size in zip(paths, sizes, strict=True):
        logging.info("wrote %s (%.2f MB)", path, size / 1e6)
    return sum(sizes)


if __name__ == "__main__":
    cli.run_main(lambda: main(sys.argv[1:]))
