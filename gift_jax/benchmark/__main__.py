# SPDX-License-Identifier: Apache-2.0
"""Runs every defense against every attack, and measures uncurated samples.

    python -m gift_jax.benchmark --config configs/emoji_benchmark.py:short \
        --workdir runs/short

For each concept, each method immunizes the model once. Each attack is then run on the
result twice: on the images of the concept (harmful), and on those of a safe concept
that the model does not know (benign), which should stay as easy to teach as before.
Samples are drawn and measured after several numbers of attack steps. Besides, "before"
is what is drawn without an attack, and "retained" is known safe concepts.

Every cell has its own folder and runs once: repeat the command to resume. More methods,
concepts or attacks add their cells. Several processes may share a folder if each runs
other cells (--config.concepts=...). Writes results.json, results.md and image grids;
`python -m gift_jax.report RUN` makes a page of them.
"""

import shlex
import sys

from gift_jax.benchmark import cells
from gift_jax.runtime import cli


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    cfg, workdir = cli.parse(argv, __doc__, "benchmark")
    command = shlex.join(["python", "-m", "gift_jax.benchmark", *argv])
    cells.run(cfg, workdir, command)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
