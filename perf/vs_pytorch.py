# SPDX-License-Identifier: Apache-2.0
"""How fast is this package on this machine, next to PyTorch?

    python perf/vs_pytorch.py --parts emoji-step --parts emoji-sampling
    python perf/vs_pytorch.py --parts emoji-gift --pytorch compiled --processes 3
    python perf/vs_pytorch.py --model runs/sd15 --parts sd15-step-32 --repeats 5
    python perf/vs_pytorch.py --parts sd15-step-64 --dtype bfloat16 --batch 4

Parts:
  sd15-step-32, -64     GIFT's outer step (a lower and an upper update of the
                        cross-attention, --batch pairs each, representation noising)
                        on latents of that side, from cached latents and text states
  sd15-encode-32, -64   the same, PyTorch's side encoding the image and the prompt
                        anew in every update, as the published IMMA script does
  emoji-step            a pretraining step of emoji-sd's UNet, batch of 64
  emoji-gift            GIFT's outer step on emoji-sd, 12 harmful and 24 safe pairs
  emoji-sampling        24 images of emoji-sd, 25 DDIM steps, guided, decoded

PyTorch and diffusers, the same weights, batch and cores or GPU, each side in a process
of its own, taking turns; one prepares and warms up while the other waits. `--pytorch
eager` is both as they come; `compiled` adds torch.compile, channels last and fused
AdamW (see pytorch_side.py). Both sides in float32 (on a GPU with TF32 products, as is
JAX's default), the sd15 parts also in bfloat16: what does not train is kept in 16 bits,
PyTorch's side with autocast.

Prints one JSON object, of each part: how many times as fast (the median of --processes
fresh pairs of processes, each of them, and the largest less the smallest), seconds
(medians, and the range of all runs), seconds of each process's first run, which
compiles (later processes find compiled code in a cache), peak memory (the GPU's where
there is one), and page faults of a run, a mean: many thousands say that the heap grew
in one of them, or that memory is given back. Of a part that PyTorch cannot compile, or
compiles to another gradient than the eager one, it prints why, in one line.

On CPUs that others use too, set OMP_WAIT_POLICY=PASSIVE: PyTorch's threads wait for
each other in a loop, and a step of 0.25 s took 2 to 5 s beside one other process.

Without --model the sd15 parts write a random one first. Needs torch (`pip install
'gift_jax[test]'`), and to compile on CPUs a C++ compiler; the sd15 parts need 20 GB of
memory.
"""

import argparse
import importlib
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import workloads

from gift_jax.runtime import cli
from gift_jax.runtime.errors import UserError, at_least

SIDES = {"gift_jax": "jax_side", "pytorch": "pytorch_side"}  # and their modules
PARTS = (
    *("sd15-step-32", "sd15-step-64", "sd15-encode-32", "sd15-encode-64"),
    *("emoji-step", "emoji-gift", "emoji-sampling"),
)
WARM_UP = {"sd15": 2, "emoji": 10}  # until memory has settled


class PartError(Exception):
    """PyTorch cannot compile a part."""


# --- one process ----------------------------------------------------------------------


def serve(side: str, args) -> None:
    """Does the work once for every line that comes; answers are lines of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed

    def answer(**values):
        print(json.dumps(values), file=answers, flush=True)

    module, (part,) = importlib.import_module(SIDES[side]), args.parts
    compiled = side == "pytorch" and args.pytorch == "compiled"
    options = {"compiled": True} if compiled else {}
    dtype = args.dtype if part.startswith("sd15") else "float32"
    run = module.build(part, args.model, dtype, args.batch, **options)
    try:
        first, *_ = [_seconds(run) for _ in range(WARM_UP[part.split("-")[0]])]
        if compiled:
            module.check(run)
    except module.FAILURES as error:
        answer(failure=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
        return
    answer(device=module.device_name(), first_run_s=round(first, 1))
    before, runs = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, 0
    for _ in sys.stdin:
        answer(seconds=_seconds(run))
        runs += 1
    usage = resource.getrusage(resource.RUSAGE_SELF)
    peak = module.peak_bytes() or 1024 * usage.ru_maxrss
    faults = (usage.ru_minflt - before) // max(1, runs)
    answer(peak_GB=round(peak / 1e9, 2), page_faults=faults)


def _seconds(run) -> float:
    clock = time.perf_counter()
    run()
    return time.perf_counter() - clock


# --- taking turns ---------------------------------------------------------------------


def measure(args, part: str, folder: str, environ: dict[str, str]) -> dict:
    """Returns the ratio, seconds and memory of both sides of one part."""
    try:
        pairs = [_pair(args, part, folder, environ) for _ in range(args.processes)]
    except PartError as error:
        return {"failure": str(error)}
    medians = [
        {side: statistics.median(values["seconds"]) for side, values in pair.items()}
        for pair in pairs
    ]
    ratios = [m["pytorch"] / m["gift_jax"] for m in medians]

    def by_side(value):
        return {side: value([pair[side] for pair in pairs]) for side in SIDES}

    def seconds(processes):
        return [s for process in processes for s in process["seconds"]]

    return {
        "times_as_fast_as_pytorch": round(statistics.median(ratios), 2),
        "of_each_pair": [round(ratio, 2) for ratio in ratios],
        "spread": round(max(ratios) - min(ratios), 2),
        "seconds": by_side(lambda ps: round(statistics.median(seconds(ps)), 4)),
        "range": by_side(lambda ps: [round(f(seconds(ps)), 4) for f in (min, max)]),
        "first_run_s": by_side(lambda ps: [p["first_run_s"] for p in ps]),
        "peak_GB": by_side(lambda ps: max(p["peak_GB"] for p in ps)),
        "page_faults": by_side(lambda ps: max(p["page_faults"] for p in ps)),
        "device": by_side(lambda ps: ps[0]["device"]),
    }


def _pair(args, part: str, folder: str, environ: dict[str, str]) -> dict[str, dict]:
    """Returns the answers of a fresh process of each side, by side.

    Raises: PartError if PyTorch cannot compile the part.
    """
    children, answers = {}, {}
    try:
        for side in SIDES:
            command = [sys.executable, __file__, f"--side={side}", f"--parts={part}"]
            command += [f"--model={folder}", f"--batch={args.batch}"]
            command += [f"--dtype={args.dtype}", f"--pytorch={args.pytorch}"]
            children[side] = subprocess.Popen(
                command,
                env=environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            answers[side] = _answer(part, side, children[side].stdout.readline())
            if "failure" in answers[side]:
                raise PartError(answers[side]["failure"])
            answers[side]["seconds"] = []
        for _ in range(args.repeats):
            for side, child in children.items():
                print("go", file=child.stdin, flush=True)
                answer = _answer(part, side, child.stdout.readline())
                answers[side]["seconds"].append(answer["seconds"])
    finally:
        rest = {side: child.communicate()[0] for side, child in children.items()}
    for side, line in rest.items():
        answers[side] |= _answer(part, side, line)
    return answers


def _answer(part: str, side: str, line: str) -> dict:
    if not line:
        raise UserError(f"{part}, {side} failed; its error is above")
    return json.loads(line)


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--parts", action="append", choices=PARTS, help="default: all")
    flags.add_argument("--model", default="", help="a folder of SD 1.5")
    flags.add_argument(
        "--pytorch", choices=("eager", "compiled"), default="eager", help="its side"
    )
    flags.add_argument("--processes", type=int, default=1, help="pairs, one by one")
    flags.add_argument("--repeats", type=int, default=7, help="runs of each process")
    flags.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of sd15"
    )
    flags.add_argument("--batch", type=int, default=1, help="pairs a level, of sd15")
    flags.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = flags.parse_args()
    for name in ("processes", "repeats", "batch"):
        at_least(f"--{name}", getattr(args, name), 1)
    if args.side:
        serve(args.side, args)
        return 0
    from gift_jax.models.load import EMBEDDED

    results = {"processor": workloads.processor(), "cores": os.cpu_count()}
    results["pytorch"] = args.pytorch
    with tempfile.TemporaryDirectory() as temp:
        environ = {
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5",  # a GPU's, shared
            "JAX_COMPILATION_CACHE_DIR": f"{temp}/xla",
            "TORCHINDUCTOR_CACHE_DIR": f"{temp}/inductor",
        } | os.environ
        for part in args.parts or PARTS:
            folder = str(EMBEDDED)
            if part.startswith("sd15"):
                folder = args.model or _random_model(pathlib.Path(temp) / "sd15")
            results[part] = measure(args, part, folder, environ)
            print(json.dumps({part: results[part]}), file=sys.stderr, flush=True)
    print(json.dumps(results, indent=1))
    return 0


def _random_model(folder: pathlib.Path) -> str:
    from gift_jax.models.sd import architectures, random_weights

    if not folder.exists():
        random_weights.write(folder, architectures.MODELS["sd15"], "float16")
    return str(folder)


if __name__ == "__main__":
    cli.run_main(main)
