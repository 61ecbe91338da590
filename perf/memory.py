# SPDX-License-Identifier: Apache-2.0
"""What does a full-size Stable Diffusion take of memory, time and disk here?

    python perf/memory.py --parts load --parts convert --parts step

Each measurement is a process of its own; prints one JSON object.

load: `stable_diffusion.load` in each --dtype, with the files dropped from the system's
  page cache first (cold) and again with them in it (warm): seconds, peak resident
  memory above what the imports take, and that over the parameters' bytes in the dtype.
convert: `gift_jax.convert` from-diffusers and to-diffusers in the files' own dtype:
  seconds and peak resident memory, all included, and that over the files' bytes.
step: GIFT's outer step as `gift_jax.train` with configs/emoji_gift.py takes it:
  in float32, cross-attention trains, one harmful and one safe pair of random latents of
  32x32. Seconds to compile and a step (median), peak memory of each phase, XLA's own
  account of the program's memory, and one checkpoint's size on disk. Takes minutes to
  compile and 9 GB of memory on two CPU cores.

Without --model it writes a random one first and removes it after.
Linux only: peaks are VmHWM of /proc/self/status. Mapped files count while resident.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import workloads

from gift_jax.runtime import cli
from gift_jax.runtime.errors import UserError, at_least, choice

DTYPES = ("float32", "float16", "bfloat16")
PARTS = ("load", "convert", "step")
LATENT_SIDE = 32


def memory(field: str) -> int:
    """Returns this process's VmRSS (now) or VmHWM (peak since `reset_peak`), bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise UserError(f"/proc/self/status has no {field}; this needs Linux")


def reset_peak() -> None:
    """Sets VmHWM to what is resident now."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def measured(work):
    """Returns (the result of `work`, its seconds and peak memory in GB)."""
    reset_peak()
    clock = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - clock
    cost = {"seconds": round(seconds, 2), "peak_GB": _gb(memory("VmHWM"))}
    return result, cost


def _gb(count: int) -> float:
    return round(count / 1e9, 3)


def drop_from_page_cache(folder: pathlib.Path) -> None:
    """Asks the system to forget the folder's files, so that a read is from the disk."""
    for file in folder.rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


# --- each in its own process ----------------------------------------------------------


def measure_load(folder: pathlib.Path, dtype: str) -> dict:
    """Returns the cost of `stable_diffusion.load`, above that of the imports."""
    import jax
    import jax.numpy as jnp

    from gift_jax.models.sd import stable_diffusion

    jax.block_until_ready(jnp.zeros(()))  # the backend's start is not the load's
    before = memory("VmRSS")

    def load():
        model = stable_diffusion.load(folder, jnp.dtype(dtype))
        jax.block_until_ready(model.params)
        return model

    model, cost = measured(load)
    parameters = sum(a.nbytes for a in jax.tree.leaves(model.params))
    above = memory("VmHWM") - before
    return {
        "seconds": cost["seconds"],
        "parameters_GB": _gb(parameters),
        "peak_above_imports_GB": _gb(above),
        "peak_over_parameters": round(above / parameters, 2),
        "kept_above_imports_GB": _gb(memory("VmRSS") - before),
        "imports_GB": _gb(before),
    }


def measure_convert(folder: pathlib.Path, out: str) -> dict:
    """Returns the cost of one direction; `folder` is what is converted."""
    from gift_jax import convert
    from gift_jax.models import orbax as orbax_model

    back = orbax_model.is_model_checkpoint(folder)
    flags = ["to-diffusers", f"--checkpoint={folder}"]
    if not back:
        flags = ["from-diffusers", f"--model={folder}"]
    _, cost = measured(lambda: convert.main([*flags, f"--out={out}"]))
    weights = pathlib.Path(out if back else folder).rglob("*.safetensors")
    size = sum(p.stat().st_size for p in weights)
    ratio = round(1e9 * cost["peak_GB"] / size, 2)
    return cost | {"weights_GB": _gb(size), "peak_over_weights": ratio}


def measure_step(folder: pathlib.Path, repeats: int) -> dict:
    """Returns the cost of loading, compiling, stepping and saving, in turn."""
    import jax

    from gift_jax.models.load import load_model
    from gift_jax.training import checkpoint, sharding

    mesh = sharding.make_default_mesh(1)
    jax.config.update("jax_enable_compilation_cache", False)

    def start():
        model = load_model(str(folder))
        step, state, frozen = workloads.gift_step(model, workloads.gift_config())
        placed = sharding.replicate(mesh, (state, frozen))
        return model, step, *jax.block_until_ready(placed)

    (model, step, state, frozen), cost_load = measured(start)
    pairs = workloads.gift_pairs(model, {"safe": 1, "harmful": 1}, LATENT_SIDE)
    batch = sharding.put_batch(mesh, pairs)
    key = sharding.replicate(mesh, jax.random.key(0))
    lowered, cost_trace = measured(lambda: step.lower(state, frozen, batch, key))
    compiled, cost_compile = measured(lowered.compile)
    account = compiled.memory_analysis()
    seconds, peaks = [], []
    for _ in range(repeats + 1):
        (state, metrics), cost = measured(
            lambda s=state: jax.block_until_ready(compiled(s, frozen, batch, key))
        )
        seconds.append(cost["seconds"])
        peaks.append(cost["peak_GB"])
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    trained = sum(a.nbytes for a in state.params.values())
    with tempfile.TemporaryDirectory() as temp:

        def save():
            store = checkpoint.Checkpoints(pathlib.Path(temp) / "checkpoints")
            store.save(repeats, state, {})
            store.close()

        _, cost_save = measured(save)
        files = [p for p in pathlib.Path(temp).rglob("*") if p.is_file()]
        cost_save["disk_GB"] = _gb(sum(p.stat().st_size for p in files))
    return {
        "load": cost_load,
        "trace": cost_trace,
        "compile": cost_compile,
        "step": {
            "seconds": statistics.median(seconds[1:]),
            "seconds_first": seconds[0],
            "peak_GB": max(peaks),
        },
        "checkpoint": cost_save,
        "trained_GB": _gb(trained),
        "state_GB": _gb(sum(a.nbytes for a in jax.tree.leaves(state))),
        "frozen_GB": _gb(sum(a.nbytes for a in jax.tree.leaves(frozen))),
        "xla_temporaries_GB": _gb(account.temp_size_in_bytes),
        "xla_arguments_GB": _gb(account.argument_size_in_bytes),
        "loss": {name: float(value) for name, value in metrics.items()},
    }


# --- the command ----------------------------------------------------------------------


def in_child(*flags: str) -> dict:
    """Runs one measurement in a process of its own; returns what it prints."""
    command = [sys.executable, __file__, *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(flags)} failed; its error is above")
    return json.loads(done.stdout)


def run(args, folder: pathlib.Path) -> dict:
    """Returns every measurement asked for."""
    result, common = {"cpu_count": os.cpu_count()}, (f"--model={folder}",)
    if "load" in args.parts:
        result["load"] = {}
        for dtype in args.dtype:
            drop_from_page_cache(folder)
            for cache in ("cold", "warm"):
                cost = in_child("--child=load", f"--dtype={dtype}", *common)
                result["load"][f"{dtype} {cache}"] = cost
    if "convert" in args.parts:
        with tempfile.TemporaryDirectory() as temp:
            whole, back = f"--out={temp}/orbax", f"--out={temp}/back"
            result["convert"] = {
                "from-diffusers": in_child("--child=convert", whole, *common),
                "to-diffusers": in_child(
                    "--child=convert", back, f"--model={temp}/orbax"
                ),
            }
    if "step" in args.parts:
        repeats = f"--repeats={args.repeats}"
        result["step"] = in_child("--child=step", repeats, *common)
    return result


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--model", default="", help="a diffusers folder")
    flags.add_argument("--parts", action="append", choices=PARTS, help="default: all")
    flags.add_argument("--dtype", action="append", choices=DTYPES, help="default: all")
    flags.add_argument("--repeats", type=int, default=3, help="steps timed")
    flags.add_argument("--random", default="sd15", help="what to write, sd15 or sd21")
    flags.add_argument("--disk_dtype", default="float32", choices=DTYPES)
    flags.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    flags.add_argument("--out", help=argparse.SUPPRESS)
    args = flags.parse_args()
    at_least("--repeats", args.repeats, 1)
    folder = pathlib.Path(args.model)
    if args.child == "load":
        result = measure_load(folder, args.dtype[0])
    elif args.child == "convert":
        result = measure_convert(folder, args.out)
    elif args.child == "step":
        result = measure_step(folder, args.repeats)
    else:
        args.parts, args.dtype = args.parts or PARTS, args.dtype or DTYPES
        with tempfile.TemporaryDirectory() as temp:
            if not args.model:
                from gift_jax.models.sd import architectures, random_weights

                choice("--random", args.random, tuple(architectures.MODELS))
                configs = architectures.MODELS[args.random]
                folder = pathlib.Path(temp) / args.random
                random_weights.write(folder, configs, args.disk_dtype)
            result = run(args, folder.absolute())
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    cli.run_main(main)
