# SPDX-License-Identifier: Apache-2.0
"""Turn benchmark folders into one page that opens anywhere.

Reads each RUN's results.json and pictures, and writes
  index.html        one self-contained page: tables, plots and pictures with toggles
  table.md          its tables
  trajectories.png  what attacks reach after each step
  tradeoff.png      what each defence takes from attackers and from honest users
into RUN/report/ of the first RUN, or beside FILE.html. Several RUNs share the page, on
which one is chosen; the plots of the second are trajectories_2.png and so on.

examples:
  python -m gift_jax.report runs/benchmark
  python -m gift_jax.report runs/benchmark --pictures 4 --metric judge_i --over peak
  python -m gift_jax.report runs/one runs/two --out both.html
"""

import argparse
import pathlib
import sys

from absl import logging

from gift_jax.report import results, tables
from gift_jax.runtime import cli
from gift_jax.runtime.errors import UserError, at_least, choice

_LARGE = 50e6  # bytes of a page


def _parser() -> argparse.ArgumentParser:
    p = cli.parser(__doc__, "report")
    p.add_argument("runs", nargs="+", metavar="RUN", help="a folder with results.json")
    p.add_argument("--out", metavar="FILE.html", help="(default RUN/report/index.html)")
    p.add_argument(
        "--pictures",
        type=int,
        default=8,
        metavar="N",
        help="embed the first N of each point, 0 for none (default 8)",
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
    return p


def _check(args, runs: list[results.Run]) -> None:
    at_least("--pictures", args.pictures, 0)
    for flag, value, named in (
        ("--metric", args.metric, results.metrics),
        ("--over", args.over, tables.overs),
    ):
        choices = dict.fromkeys(name for run in runs for name in named(run.data))
        if value:
            choice(flag, value, tuple(choices))
    if args.out and not args.out.endswith((".html", ".htm")):
        raise UserError(
            f"--out={args.out} must end in .html; try --out={args.out}.html"
        )
    if args.out and pathlib.Path(args.out).is_dir():
        raise UserError(f"--out={args.out} is a folder; must be a file")


def main(argv=None) -> int:
    """Runs the command line; returns the exit code.

    Raises: UserError for a mistake in the flags or a results.json.
    """
    args = _parser().parse_args(argv)
    runs = results.load_all(args.runs)
    _check(args, runs)
    from gift_jax.report import page  # matplotlib takes a while

    out = pathlib.Path(args.out or runs[0].folder / "report" / "index.html")
    try:
        paths = page.write(
            runs, out, count=args.pictures, metric=args.metric, over=args.over
        )
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error}") from error
    for path in paths:
        logging.info("wrote %s (%.1f MB)", path, path.stat().st_size / 1e6)
    if out.stat().st_size > _LARGE:
        logging.info("a page that large opens slowly; --pictures 4 makes it smaller")
    return 0


if __name__ == "__main__":
    cli.run_main(lambda: main(sys.argv[1:]))
