# SPDX-License-Identifier: Apache-2.0
"""How much memory does a config's step take of one device, by XLA's own account?

    python perf/step_memory.py --config configs/sdxl_object.py --batch 1

Compiles the step of `gift_jax.train` for this machine's CPU, from shapes alone: no
weights are needed, and nothing is computed. Arguments and results are those of any
device. Temporaries are an upper bound for a GPU or a TPU: XLA's CPU compiler computes
bfloat16 in float32 and fuses less. For TPUs there is a real account: gift-jax compile.

Prints one JSON object. SDXL takes about five minutes on two CPU cores.
"""

import json
import os

# quick code would not change what lies in memory
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    )
)

import time

import jax

from gift_jax import train
from gift_jax.compile import tpu
from gift_jax.defenses import base
from gift_jax.runtime import cli
from gift_jax.runtime.devices import init_jax
from gift_jax.runtime.errors import at_least
from gift_jax.training import sharding

GB = 1e9


def main(argv: list[str] | None = None) -> int:
    flags = cli.parser(__doc__, "train")
    flags.add_argument("--batch", type=int, default=1, help="pairs of each group")
    flags.add_argument("--step", choices=tpu.STEPS, default="train")
    flags.add_argument("--phase", type=int, default=1, help="of several")
    cfg, args = cli.parse_config(argv, flags, "train")
    at_least("--batch", args.batch, 1)
    for group in base.load(cfg.method).groups:
        cfg[group].update(tpu.NO_DATA | {"batch": args.batch})
    init_jax()
    run = train.resolve(cfg)
    mesh = sharding.make_mesh(jax.devices()[:1])
    if args.step == "unet":
        step, shapes = tpu.unet_step(run, mesh, args.batch)
    else:
        step, shapes = tpu.train_step(run, mesh, args.phase)
    start = time.perf_counter()
    lowered = step.lower(*shapes)
    account = lowered.compile().memory_analysis()
    seconds = time.perf_counter() - start
    sizes = {
        "arguments": account.argument_size_in_bytes,
        "results": account.output_size_in_bytes - account.alias_size_in_bytes,
        "temporaries": account.temp_size_in_bytes,
    }
    report = {
        "method": run.method,
        "model": run.model,
        "step": args.step,
        "phase": args.phase,
        "batch": args.batch,
        "compute_dtype": run.compute_dtype,
        "remat": run.hardware.remat,
        "GB": {name: round(size / GB, 2) for name, size in sizes.items()},
        "sum_GB": round(sum(sizes.values()) / GB, 2),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    cli.run_main(main)
