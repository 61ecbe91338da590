# SPDX-License-Identifier: Apache-2.0
"""Compiles the step of a config of gift_jax.train for TPUs, on a machine without any.

    python -m gift_jax.compile --config configs/sd15_object.py --topology v5e:4x4 \\
        --batch-per-chip 4 --config.compute_dtype=bfloat16

Says how much of a chip's memory the step takes, what it computes and moves, how long it
takes at least (roofline), and what the chips send each other. Needs the TPU compiler:
pip install 'gift_jax[tpu]', or TPU_LIBRARY_PATH=.../libtpu.so. A full-size model
takes minutes to compile, and several GB of memory.
"""

import importlib.util
import json
import logging as std_logging
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import logging

from gift_jax import config, files
from gift_jax.config import UserError

_CHILD = "GIFT_JAX_COMPILE_INTO"  # in the child's environment: where its report goes
_KEPT = (  # of the environment
    *("HOME", "LANG", "LC_ALL", "PATH", "PYTHONPATH", "TMPDIR", "VIRTUAL_ENV"),
    *("GIFT_JAX_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "LIBTPU_INIT_ARGS"),
    "TPU_LIBRARY_PATH",
)


def _parser():
    flags = config.parser(__doc__, "compile")
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
    flags.add_argument("--out", type=pathlib.Path, help="file for the report, JSON")
    return flags


def main(argv: list[str] | None = None) -> int:
    cfg, args = config.parse_config(argv, _parser(), "train")
    config.at_least("--batch-per-chip", args.batch_per_chip, 0)
    if os.environ.get(_CHILD):
        return _child(cfg, args, pathlib.Path(os.environ[_CHILD]))
    check_compiler()
    if args.out and not args.out.parent.is_dir():
        raise UserError(f"--out={args.out}: no such folder as {args.out.parent}")
    argv = sys.argv[1:] if argv is None else argv
    found = _in_child(argv, args.topology)
    if args.out:
        files.write(args.out, json.dumps(found, indent=1) + "\n")
    print(table(found))
    return 0


def check_compiler() -> None:
    """Raises UserError if the TPU compiler is not there."""
    library = os.environ.get("TPU_LIBRARY_PATH")
    if library and not pathlib.Path(library).is_file():
        raise UserError(f"TPU_LIBRARY_PATH={library} is no file")
    if not library and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the TPU compiler is missing; pip install 'gift_jax[tpu]', or name it: "
            "TPU_LIBRARY_PATH=.../libtpu.so"
        )


def _in_child(argv: list[str], topology: str) -> dict:
    """Returns the report of a child process, which alone loads the TPU compiler."""
    with tempfile.TemporaryDirectory() as folder:
        into = pathlib.Path(folder) / "report.json"
        command = [sys.executable, "-m", "gift_jax.compile", *argv]
        child = subprocess.Popen(command, env=environment() | {_CHILD: str(into)})
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.kill()  # at SIGTERM the compiler prints its stack
            child.wait()
            raise
        if code == 2:  # it has said why
            sys.exit(2)
        if code:
            raise RuntimeError(f"the compiler ended with {code} ({topology})")
        return json.loads(into.read_text())


def environment() -> dict[str, str]:
    """Returns the environment of a process that is to load the TPU compiler."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return kept | {
        "JAX_PLATFORMS": "cpu",  # or JAX looks for the TPU
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # whatever it is, or it is looked for
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def _child(cfg, args, into: pathlib.Path) -> int:
    from gift_jax import ahead, sharding

    std_logging.getLogger("jax").setLevel(std_logging.ERROR)
    sharding.prepare()
    began = time.monotonic()

    def attempt(batch):
        told = f"{batch} a chip" if batch else "the config's batch"
        logging.info("compiling for %s, %s; this takes a while", args.topology, told)
        try:
            found = ahead.report(cfg, args.topology, batch)
        except ahead.DoesNotFit as error:
            logging.info("%s %s", told, error)
            raise
        used = found["hbm_bytes"]["used"] / ahead.GB
        clock = time.monotonic() - began
        logging.info("%s fits: %.2f GB, %.0f s so far", told, used, clock)
        return found

    ahead.chip_of(args.topology)
    try:
        if args.fit:
            found = ahead.fit(attempt, low=args.batch_per_chip or 1)
        else:
            found = attempt(args.batch_per_chip)
    except ahead.DoesNotFit as error:
        hint = "more chips with --config.mesh.fsdp and shard_frozen"
        hint = "a smaller --batch-per-chip, " * bool(args.batch_per_chip != 1) + hint
        raise UserError(
            f"--topology={args.topology}: the step {error}; try --config.remat=block, "
            f"{hint}"
        ) from error
    into.write_text(json.dumps(found))
    return 0


def table(found: dict) -> str:
    """Returns a report as lines to read."""
    from gift_jax.ahead import GB

    hbm = {name: size / GB for name, size in found["hbm_bytes"].items()}
    batch = ", ".join(f"{n:g} {g}" for g, n in found["batch_per_chip"].items())
    sent = [
        f"{kind} {one['count']} x, {one['bytes'] / GB:.4f} GB"
        for kind, one in found["collectives"].items()
    ]
    rows = {
        "step": f"{found['method']} on {found['model']}, latents {found['latents']}",
        "chips": f"{found['chips']} ({found['topology']})",
        "batch a chip": batch,
        "computed in": f"{found['compute_dtype']}, remat {found['remat']}",
        "memory": f"{hbm['used']:.2f} of {hbm['capacity']:.2f} GB: arguments "
        f"{hbm['arguments']:.2f}, temporaries {hbm['temporaries']:.2f}",
        "work": f"{found['flops'] / 1e12:.3f} TFLOP, {found['bytes_accessed'] / GB:.1f}"
        f" GB accessed, {found['flops_per_byte']} FLOP a byte",
        "roofline": f"{found['roofline_ms']} ms a step, limited by "
        f"{found['limited_by']}; compute alone {found['compute_fraction']:.0%} of it",
        "sent": "; ".join(sent) or "nothing",
        "compiled in": f"{found['seconds']['compile']} s",
    }
    if "tried" in found:
        rows["batches tried"] = ", ".join(map(str, found["tried"]))
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


if __name__ == "__main__":
    config.run_main(main)
