# SPDX-License-Identifier: Apache-2.0
"""Gap ratios of one method against another's, where two folders hold their cells.

    python perf/compare_gaps.py docs/results/standard gift \\
        docs/results/noise gift_standard_noise

The first folder holds the original's cells too. For each attack by name, after --step
steps: the gap ratios by what the judge recognises, mean over the concepts that both
have; at last the difference of the means over attacks, with its interval (bootstrap
over concepts). Prints one JSON object.
"""

import argparse
import json
import pathlib

import numpy as np

from gift_jax.benchmark import gap_ratios
from gift_jax.runtime import cli
from gift_jax.runtime.errors import UserError

ATTACKS = ("dreambooth", "dreambooth_x3", "lora", "lora_x3")


def recognised(cells: pathlib.Path, side: str, attack: str, step: int) -> float:
    cell = json.loads((cells / side / attack / "name_0" / "cell.json").read_text())
    (point,) = (point for point in cell["points"] if point["step"] == step)
    return point["values"]["classifier_accuracy"]


def ratios(run, other, method: str, concept: str, side: str, step: int) -> list[float]:
    """Returns the gap ratio of each attack, the original's cells being in `run`."""
    original, defended = (
        folder / "cells" / concept / name
        for folder, name in ((run, "original"), (other, method))
    )
    return [
        gap_ratios.gap_ratio(
            recognised(original, side, attack, step),
            recognised(defended, side, attack, step),
        )
        for attack in ATTACKS
    ]


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("run", type=pathlib.Path)
    flags.add_argument("method")
    flags.add_argument("other_run", type=pathlib.Path)
    flags.add_argument("other_method")
    flags.add_argument("--step", type=int, default=300, help="default: %(default)s")
    args = flags.parse_args()
    pairs = ((args.run, args.method), (args.other_run, args.other_method))
    in_both = set.intersection(
        *({p.parent.name for p in run.glob(f"cells/*/{name}")} for run, name in pairs)
    )
    if not in_both:
        raise UserError("no concept has cells of both methods")
    found = {"concepts": sorted(in_both)}
    for side in ("harmful", "benign"):
        one, two = (
            np.array(
                [
                    ratios(args.run, run, name, concept, side, args.step)
                    for concept in sorted(in_both)
                ]
            )
            for run, name in pairs
        )
        by_attack = np.stack([one.mean(0), two.mean(0)], axis=1).round(3).tolist()
        change = (two - one).mean(axis=1)
        found[side] = {
            "by_attack": dict(zip(ATTACKS, by_attack, strict=True)),
            "mean": [round(float(part.mean()), 3) for part in (one, two)],
            "difference": round(float(change.mean()), 3),
            "interval": [round(end, 3) for end in gap_ratios.bootstrap(change)],
        }
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    cli.run_main(main)
