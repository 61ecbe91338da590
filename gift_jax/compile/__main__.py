# SPDX-License-Identifier: Apache-2.0
"""Compiles the step of a config of gift_jax.train for TPUs, on a machine without any.

    python -m gift_jax.compile --config configs/sd15_object.py --topology v5e:4x4 \\
        --batch-per-chip 4 --config.compute_dtype=bfloat16

Reports how much of a chip's memory the step takes, what it computes and moves, how long
it takes at least (roofline), and what the chips send each other. Needs the TPU
compiler: pip install '.[tpu]', or TPU_LIBRARY_PATH=.../libtpu.so. A full-size
model takes minutes to compile, and many GB of memory; with --quick far less.
"""

import json
import os
import pathlib
import sys

from gift_jax.compile import child as compile_child
from gift_jax.runtime import cli, files
from gift_jax.runtime.errors import UserError, at_least


def _parser():
    flags = cli.parser(__doc__, "compile")
    flags.add_argument(
        "--topology", required=True, help="v4, v5e, v5p or v6e and a shape: v5e:4x4"
    )
    flags.add_argument(
        "--batch-per-chip",
        type=int,
        default=0,
        help="pairs of each group (default: the config's batch, of all chips together)",
    )
    flags.add_argument(
        "--fit", action="store_true", help="find the largest batch a chip that fits"
    )
    flags.add_argument(
        "--step",
        choices=("train", "unet"),
        default="train",
        help="the defense's step, or one pass of the denoiser forward and backward",
    )
    flags.add_argument(
        "--phase",
        type=int,
        default=1,
        help="of a defense that trains in several, one after the other (default 1)",
    )
    flags.add_argument(
        "--quick",
        action="store_true",
        help="the compiler's least effort, for large models: a tenth of the time, the "
        "same arithmetic, nearly the same memory",
    )
    flags.add_argument("--out", type=pathlib.Path, help="file for the report, JSON")
    return flags


def main(argv: list[str] | None = None) -> int:
    cfg, args = cli.parse_config(argv, _parser(), "train")
    at_least("--batch-per-chip", args.batch_per_chip, 0)
    at_least("--phase", args.phase, 1)
    if out := os.environ.get(compile_child.OUT):
        return compile_child.run_child(cfg, args, pathlib.Path(out))
    compile_child.check_compiler()
    if args.out and not args.out.parent.is_dir():
        raise UserError(f"--out={args.out}: no such folder as {args.out.parent}")
    argv = sys.argv[1:] if argv is None else argv
    report = compile_child.compile_in_child(argv, args.topology)
    if args.out:
        files.write(args.out, json.dumps(report, indent=1) + "\n")
    print(compile_child.table(report))
    return 0


if __name__ == "__main__":
    cli.run_main(main)
