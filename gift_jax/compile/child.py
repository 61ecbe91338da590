# SPDX-License-Identifier: Apache-2.0
"""The process that loads the TPU compiler, and what it reports."""

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

from gift_jax.runtime.errors import UserError

CHILD = "GIFT_JAX_COMPILE_INTO"  # in the child's environment: where its report goes
_KEPT = (  # of the environment
    *("HOME", "LANG", "LC_ALL", "PATH", "PYTHONPATH", "TMPDIR", "VIRTUAL_ENV"),
    *("GIFT_JAX_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "LIBTPU_INIT_ARGS"),
    "TPU_LIBRARY_PATH",
)


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


def compile_in_child(argv: list[str], topology: str) -> dict:
    """Returns the report of a child process, which alone loads the TPU compiler."""
    with tempfile.TemporaryDirectory() as folder:
        into = pathlib.Path(folder) / "report.json"
        command = [sys.executable, "-m", "gift_jax.compile", *argv]
        child = subprocess.Popen(command, env=environment() | {CHILD: str(into)})
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


def run_child(cfg, args, into: pathlib.Path) -> int:
    from gift_jax.compile import tpu
    from gift_jax.runtime.devices import init_jax

    std_logging.getLogger("jax").setLevel(std_logging.ERROR)
    init_jax()
    began = time.monotonic()

    def attempt(batch):
        told = f"{batch} a chip" if batch else "the config's batch"
        logging.info("compiling for %s, %s; this takes a while", args.topology, told)
        try:
            found = tpu.report(cfg, args.topology, batch)
        except tpu.DoesNotFit as error:
            logging.info("%s %s", told, error)
            raise
        used = found["hbm_bytes"]["used"] / tpu.GB
        clock = time.monotonic() - began
        logging.info("%s fits: %.2f GB, %.0f s so far", told, used, clock)
        return found

    tpu.chip_of(args.topology)
    try:
        if args.fit:
            found = tpu.fit(attempt, low=args.batch_per_chip or 1)
        else:
            found = attempt(args.batch_per_chip)
    except tpu.DoesNotFit as error:
        hint = "more chips with --config.hardware.mesh.fsdp and shard_frozen"
        hint = "a smaller --batch-per-chip, " * bool(args.batch_per_chip != 1) + hint
        raise UserError(
            f"--topology={args.topology}: the step {error}; try --config.remat=block, "
            f"{hint}"
        ) from error
    into.write_text(json.dumps(found))
    return 0


def table(found: dict) -> str:
    """Returns a report as lines to read."""
    from gift_jax.compile import tpu

    hbm = {name: size / tpu.GB for name, size in found["hbm_bytes"].items()}
    batch = ", ".join(f"{n:g} {g}" for g, n in found["batch_per_chip"].items())
    sent = [
        f"{kind} {one['count']} x, {one['bytes'] / tpu.GB:.4f} GB"
        for kind, one in found["collectives"].items()
    ]
    rows = {
        "step": f"{found['method']} on {found['model']}, latents {found['latents']}",
        "chips": f"{found['chips']} ({found['topology']})",
        "batch a chip": batch,
        "computed in": f"{found['compute_dtype']}, remat {found['remat']}",
        "memory": f"{hbm['used']:.2f} of {hbm['capacity']:.2f} GB: arguments "
        f"{hbm['arguments']:.2f}, temporaries {hbm['temporaries']:.2f}",
        "work": f"{found['flops'] / 1e12:.3f} TFLOP, "
        f"{found['bytes_accessed'] / tpu.GB:.1f} GB accessed, "
        f"{found['flops_per_byte']} FLOP a byte",
        "roofline": f"{found['roofline_ms']} ms a step, limited by "
        f"{found['limited_by']}; compute alone {found['compute_fraction']:.0%} of it",
        "sent": "; ".join(sent) or "nothing",
        "compiled in": f"{found['seconds']['compile']} s",
    }
    if "tried" in found:
        rows["batches tried"] = ", ".join(map(str, found["tried"]))
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())
