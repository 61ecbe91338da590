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

from gift_jax.compile.fit import GB, DoesNotFit, fit
from gift_jax.runtime.errors import UserError, install_command

OUT = "GIFT_JAX_COMPILE_INTO"  # in the child's environment: the report's file


def check_compiler() -> None:
    """Raises UserError if the TPU compiler is not there."""
    library = os.environ.get("TPU_LIBRARY_PATH")
    if library and not pathlib.Path(library).is_file():
        raise UserError(f"TPU_LIBRARY_PATH={library} is not a file")
    if not library and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"the TPU compiler is missing; {install_command('tpu')}, or name it: "
            "TPU_LIBRARY_PATH=.../libtpu.so"
        )


def environment() -> dict[str, str]:
    """Returns the environment of a process that is to load the TPU compiler.

    Without what is set for this machine's own devices.
    """
    ours = ("JAX_", "XLA_", "TPU_", "CLOUD_TPU_", "PJRT_")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    variables |= {k: v for k, v in os.environ.items() if k == "TPU_LIBRARY_PATH"}
    return variables | {
        "JAX_PLATFORMS": "cpu",  # or JAX looks for the TPU
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any: unset, it is looked for
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def compile_in_child(argv: list[str], topology: str) -> dict:
    """Returns the report of a child process, which alone loads the TPU compiler."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "report.json"
        command = [sys.executable, "-m", "gift_jax.compile", *argv]
        child = subprocess.Popen(command, env=environment() | {OUT: str(out)})
        try:
            code = child.wait()
        except KeyboardInterrupt:
            child.kill()  # at SIGTERM the compiler prints its stack
            child.wait()
            raise
        if code == 2:  # the child has printed why
            sys.exit(2)
        if code:
            raise RuntimeError(f"the compiler ended with {code} ({topology})")
        return json.loads(out.read_text())


def run_child(cfg, args, out: pathlib.Path) -> int:
    """Compiles what the flags ask for and writes the report; returns the exit code."""
    import jax

    from gift_jax.compile import tpu
    from gift_jax.runtime.devices import init_jax

    std_logging.getLogger("jax").setLevel(std_logging.ERROR)
    init_jax()
    if args.quick:
        jax.config.update("jax_exec_time_optimization_effort", -1.0)
        jax.config.update("jax_memory_fitting_effort", -1.0)
    start = time.monotonic()

    def attempt(batch):
        name = f"{batch} a chip" if batch else "the config's batch"
        logging.info("compiling for %s, %s; this takes a while", args.topology, name)
        try:
            report = tpu.report(cfg, args.topology, batch, args.step, args.phase)
        except DoesNotFit as error:
            logging.info("%s %s", name, error)
            raise
        used, seconds = report["hbm_bytes"]["used"], time.monotonic() - start
        logging.info("%s fits: %.2f GB, %.0f s so far", name, used / GB, seconds)
        return report

    tpu.chip_of(args.topology)
    try:
        if args.fit:
            report = fit(attempt, low=args.batch_per_chip or 1)
        else:
            report = attempt(args.batch_per_chip)
    except DoesNotFit as error:
        hint = "more chips with --config.hardware.mesh.fsdp and shard_frozen"
        if args.batch_per_chip != 1:
            hint = f"a smaller --batch-per-chip, {hint}"
        raise UserError(
            f"--topology={args.topology}: the step {error}; try "
            f"--config.hardware.remat=block, {hint}"
        ) from error
    out.write_text(json.dumps(report | {"quick": args.quick}))
    return 0


def table(report: dict) -> str:
    """Returns a report as lines to read."""
    hbm = {name: size / GB for name, size in report["hbm_bytes"].items()}
    batches = report["batch_per_chip"].items()
    traffic = [
        f"{kind} {total['count']} x, {total['bytes'] / GB:.4f} GB"
        for kind, total in report["collectives"].items()
    ]
    step = report["method"] if report["step"] == "train" else report["step"]
    step += f", phase {report['phase']}" if report["phase"] > 1 else ""
    quick = ", with the compiler's least effort" if report["quick"] else ""
    rows = {
        "step": f"{step} on {report['model']}, latents {report['latents']}",
        "chips": f"{report['chips']} ({report['topology']})",
        "batch a chip": ", ".join(f"{count:g} {name}" for name, count in batches),
        "computed in": f"{report['compute_dtype']}, remat {report['remat']}",
        "memory": f"{hbm['used']:.2f} of {hbm['capacity']:.2f} GB: arguments "
        f"{hbm['arguments']:.2f}, temporaries {hbm['temporaries']:.2f}",
        "work": f"{report['flops'] / 1e12:.3f} TFLOP, "
        f"{report['bytes_accessed'] / GB:.1f} GB accessed, "
        f"{report['flops_per_byte']} FLOP a byte",
        "roofline": f"{report['roofline_ms']} ms a step, limited by "
        f"{report['limited_by']}; compute alone {report['compute_fraction']:.0%} of it",
        "sent": "; ".join(traffic) or "nothing",
        "compiled in": f"{report['seconds']['compile']} s{quick}",
    }
    if "tried" in report:
        rows["batches tried"] = ", ".join(map(str, report["tried"]))
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())
