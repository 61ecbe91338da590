# SPDX-License-Identifier: Apache-2.0
"""Runs every defense against every attack, and measures uncurated samples.

    python -m gift_jax.benchmark --config configs/emoji_benchmark.py:quick \\
        --workdir runs/quick --workers 2

For each concept, each method immunizes the model once. Each attack is then run on the
result twice: on the images of the concept (harmful), and on those of a safe concept
that the model does not know (benign), which should stay as easy to teach as before.
Samples are drawn and measured after several numbers of attack steps. Besides, "before"
is what is drawn without an attack, and "retained" is known safe concepts.

Every cell runs once: repeat the command to resume. More methods, concepts or attacks
add their cells. cells.jsonl has a line for each that is done, and is all that another
machine needs to go on. Several processes may share a folder: --workers starts some on
the cores of this machine; elsewhere, run the command again with the same folder.
Writes results.json, results.md and image grids; `python -m gift_jax.report RUN` makes a
page of them.
"""

import argparse
import pathlib
import shlex
import sys

from gift_jax.benchmark import cells, matrix, results, store, workers, workload
from gift_jax.runtime import cli
from gift_jax.runtime.devices import num_cores
from gift_jax.runtime.errors import UserError, above


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    cfg, args = cli.parse_config(argv, _flags(), "benchmark")
    if args.dry_run:
        _describe(matrix.Matrix(cfg), args)
        return 0
    if not args.workdir:
        raise UserError("--workdir is missing; name the run's folder")
    workdir, benchmark = pathlib.Path(args.workdir), matrix.load(cfg)
    if args.worker:
        index, count = map(int, args.worker.split("/"))
        workers.take_cores(index, count)
        cells.run(benchmark, workdir)
        return 0
    workers.check(args.workers, num_cores())
    if args.workers > 1:
        workers.run(benchmark, workdir, argv, args.workers)
    else:
        cells.run(benchmark, workdir)
    command = shlex.join(["python", "-m", "gift_jax.benchmark", *argv])
    measured = store.Store(workdir)
    measured.read()
    results.publish(benchmark, workdir, measured, command)
    return 0


def _flags():
    flags = cli.parser(__doc__, "benchmark")
    flags.add_argument("--workdir", help="the run's folder")
    flags.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that share this machine's cores (default 1)",
    )
    flags.add_argument(
        "--dry-run", action="store_true", help="print what would run, and its cost"
    )
    flags.add_argument(
        "--step-seconds",
        type=float,
        default=1.0,
        metavar="S",
        help="of an attack's step, for --dry-run's estimate (default 1)",
    )
    flags.add_argument(
        "--image-seconds",
        type=float,
        default=1.0,
        metavar="S",
        help="of drawing and measuring an image, likewise (default 1)",
    )
    flags.add_argument("--worker", default="", help=argparse.SUPPRESS)
    flags.epilog = "Running the same command again resumes."
    return flags


def _describe(benchmark: matrix.Matrix, args) -> None:
    above("--step-seconds", args.step_seconds, 0, 1)
    above("--image-seconds", args.image_seconds, 0, 1)
    counts = workload.count(benchmark, benchmark.cells)
    for name, number in counts.items():
        print(f"{number:>10,} {name}")
    hours = workload.device_hours(counts, args.step_seconds, args.image_seconds)
    print(
        f"{hours:>10,.1f} device hours, at {args.step_seconds:g} s an attack's step, "
        f"{3 * args.step_seconds:g} s a defense's, {args.image_seconds:g} s an image"
    )


if __name__ == "__main__":
    cli.run_main(main)
