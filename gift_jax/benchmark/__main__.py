# SPDX-License-Identifier: Apache-2.0
"""Defences against attacks: every cell of a matrix, judged on uncurated samples.

    python -m gift_jax.benchmark --config configs/emoji_benchmark.py:short \
        --workdir runs/short

For each concept, each method immunizes the model once. Each attack is then let loose on
the result twice: on the forbidden concept's pictures (harmful) and on those of a safe
thing that the model has not seen (benign), which should stay as easy to teach as
before. Pictures are drawn and measured after several numbers of attack steps. Besides,
"before" is what is drawn with no attack, and "kept" known safe things.

Every cell has its own folder and is done once: the same command goes on where it was
stopped, and more methods, concepts or attacks add their cells. Several processes may
share a folder if each does other cells (--config.concepts=...). Writes results.json,
results.md and picture grids; `python -m gift_jax.report RUN` makes a page of them.
"""

import shlex
import sys

from gift_jax.benchmark import cells as benchmark_cells
from gift_jax.runtime import cli


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    cfg, workdir = cli.parse(argv, __doc__, "benchmark")
    benchmark_cells.run(
        cfg, workdir, shlex.join(["python", "-m", "gift_jax.benchmark", *argv])
    )
    return 0


if __name__ == "__main__":
    cli.run_main(main)
