# SPDX-License-Identifier: Apache-2.0
"""Copies a benchmark's folder without its models, its pictures few and compressed.

    python perf/light_copy.py runs/standard docs/results/standard --pictures 4

gift_jax.report makes a page of the copy, and gift_jax.benchmark goes on in it, on this
machine or another: what is done stays done. May be repeated as more cells are done.
"""

import argparse
import json
import pathlib
import shutil

import numpy as np

from gift_jax.runtime import files
from gift_jax.sampling import grid

_QUALITY = 80
_WHOLE = ("results.md", "log.txt")


def copy(run: pathlib.Path, out: pathlib.Path, pictures: int) -> int:
    """Returns how many cells were copied; those that are not done are left out."""
    done = sorted(run.glob("cells/**/cell.json"))
    for path in done:
        cell = json.loads(path.read_text())
        _lighten([cell], run, out, pictures)
        files.write_json(out / path.relative_to(run), cell)
    if (run / "results.json").exists():
        results = json.loads((run / "results.json").read_text())
        _lighten(results["cells"], run, out, pictures)
        files.write_json(out / "results.json", results)
    for name in _WHOLE:
        if (run / name).exists():
            shutil.copy(run / name, out / name)
    return len(done)


def _lighten(cells, run, out, pictures: int) -> None:
    """Writes every sheet's first pictures, the others white, and names the new file."""
    for point in (point for cell in cells for point in cell["points"]):
        old = run / point["sheet"]
        point["sheet"] = str(pathlib.Path(point["sheet"]).with_suffix(".webp"))
        new = out / point["sheet"]
        if new.exists():
            continue
        images = np.array(grid.read_sheet(old, point["num"]))
        images[pictures:] = 255
        grid.save_sheet(images, new, quality=_QUALITY, method=6)


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("run", type=pathlib.Path)
    flags.add_argument("out", type=pathlib.Path)
    flags.add_argument("--pictures", type=int, default=4, help="default: %(default)s")
    args = flags.parse_args()
    print(f"{copy(args.run, args.out, args.pictures)} cells are in {args.out}")


if __name__ == "__main__":
    main()
