# SPDX-License-Identifier: Apache-2.0
"""What does a step cost here, and what part of a run is it?

    python perf/steps.py --parts defenses --repeats 7
    python perf/steps.py --parts run --steps 300
    python perf/steps.py --parts remat --model runs/sd15 --batch 16

Parts:
  defenses  the step of each defense on emoji-sd, as `gift_jax.train` takes it, on the
            same pairs; they take turns in one process. Median seconds, and the memory
            that the compiled step plans for (arguments, results, temporaries)
  run       `gift_jax.train` twice, in processes of their own, with an empty compilation
            cache: seconds in all, programs compiled and found in the cache, and the
            share of the loop's time (metrics, checkpoints and data included) that was
            spent inside the compiled step, and in writing checkpoints. The first share
            is a lower bound: the measurement waits for every step, where a run prepares
            the next batch meanwhile
  remat     GIFT's full-size outer step in bfloat16 for each `remat`: seconds a step
            and, by the compiler's account, temporaries, TFLOP and bytes accessed

Prints one JSON object.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import workloads

from gift_jax.runtime import cli
from gift_jax.runtime.config import load_config
from gift_jax.runtime.errors import UserError, at_least

CONFIGS = workloads.ROOT / "configs"
BASELINES = CONFIGS / "emoji_baselines.py"
DEFENSES = {  # name: (config, changes)
    "gift": (CONFIGS / "emoji_gift.py", {}),
    "gift, unrolled": (CONFIGS / "emoji_gift.py", {"gift.gradient": "unrolled"}),
    "gift, joint": (CONFIGS / "emoji_gift.py", {"gift.gradient": "joint"}),
    "gift_adversarial": (CONFIGS / "emoji_gift_adversarial.py", {}),
    "maximize_prior": (f"{BASELINES}:maximize_prior", {}),
    "maximize": (f"{BASELINES}:maximize", {}),
    "imma": (f"{BASELINES}:imma", {}),
    "imma, lora": (f"{BASELINES}:imma_lora", {}),
    "esd": (f"{BASELINES}:esd", {"esd.trajectories": 6}),
}


# --- the step of each defense ---------------------------------------------------------


def make_step(name: str, model):
    """Returns (a function that takes one step and waits, bytes that it plans for)."""
    import jax

    from gift_jax import train
    from gift_jax.data.cache import cached_source
    from gift_jax.defenses import base
    from gift_jax.sampling.generated import load_group
    from gift_jax.state import init_state
    from gift_jax.training import loop, setup, sharding

    file, changes = DEFENSES[name]
    cfg = load_config(str(file))
    few = {"safe.names": ("cat face",)} if "safe" in cfg else {}
    cfg.update_from_flattened_dict(changes | few)
    run = train.resolve(cfg)
    mesh = sharding.make_default_mesh(1)
    data = {
        group: load_group(model, fields, group, model.image_size)
        for group, fields in run.data.items()
    }
    task = base.Task(run.settings, run, model, data, sources={})
    sources = {
        group: cached_source(model, data[group], fields, task.key(f"cache/{group}"))
        for group, fields in run.data.items()
    }
    plan = base.load(run.method).plan(dataclasses.replace(task, sources=sources))
    sources = {group: (sources | plan.sources)[group] for group in plan.sizes}
    batch = next(setup.make_batches(sources, plan.sizes, run.seed, "defense"))
    params = jax.tree.map(jax.numpy.array, plan.params)  # the step donates them
    held = [sharding.replicate(mesh, init_state(params, plan.opt))]
    rest = sharding.replicate(mesh, (plan.frozen, batch, task.key("steps")))
    compiled = loop.compile_step(plan.step).lower(held[0], *rest).compile()
    memory = compiled.memory_analysis()
    planned = memory.argument_size_in_bytes + memory.output_size_in_bytes
    planned += memory.temp_size_in_bytes - memory.alias_size_in_bytes

    def take():
        held[0], metrics = compiled(held[0], *rest)
        jax.block_until_ready(metrics)

    return take, planned


def measure_defenses(args) -> dict:
    """Returns {name: seconds and MB of a step, and both over those of the first}."""
    from gift_jax.models.load import load_model

    model, steps = load_model("emoji-sd"), {}
    for name in args.only or DEFENSES:
        steps[name] = make_step(name, model)
        steps[name][0]()  # warm
        print(f"compiled {name}", file=sys.stderr, flush=True)
    times = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, (take, _) in steps.items():
            start = time.perf_counter()
            take()
            times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    first = next(iter(steps))
    return {
        name: {
            "seconds": round(seconds[name], 4),
            "times_the_first": round(seconds[name] / seconds[first], 2),
            "MB": round(planned / 1e6),
            "memory_times_the_first": round(planned / steps[first][1], 2),
        }
        for name, (_, planned) in steps.items()
    }


# --- a whole run ----------------------------------------------------------------------

_COMPILED = "/jax/core/compile/backend_compile_duration"
_CACHE_HIT = "/jax/compilation_cache/cache_hits"


def run_and_time(workdir: str, config_file: str, steps: int) -> dict:
    """Returns the figures of one run, in this process."""
    import jax

    from gift_jax import train
    from gift_jax.training import checkpoint, loop

    counts = {"programs": 0, "from_cache": 0}

    def count(event, *_, **__):
        counts["programs"] += event == _COMPILED
        counts["from_cache"] += event == _CACHE_HIT

    jax.monitoring.register_event_duration_secs_listener(count)
    jax.monitoring.register_event_listener(count)
    inside, ends, saving = [], [], []
    compile_step, save = loop.compile_step, checkpoint.Checkpoints.save

    def timed_compile_step(step_fn, args=None):
        step = compile_step(step_fn, args)

        def call(*args):
            start = time.perf_counter()
            result = jax.block_until_ready(step(*args))
            ends.append(time.perf_counter())
            inside.append(ends[-1] - start)
            return result

        return call

    def timed_save(*args):
        start = time.perf_counter()
        save(*args)
        saving.append(time.perf_counter() - start)

    loop.compile_step, checkpoint.Checkpoints.save = timed_compile_step, timed_save
    start = time.perf_counter()
    train.main(
        [
            f"--config={config_file}",
            f"--workdir={workdir}",
            f"--config.steps={steps}",
            "--config.samples.num=0",
            "--config.verify=off",
        ]
    )
    loop_s = ends[-1] - ends[0]
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "steps": len(inside),
        **counts,
        "compiled": counts["programs"] - counts["from_cache"],
        "seconds_a_step": round(statistics.mean(inside[1:]), 4),
        "checkpoints": len(saving),
        "saving": round(sum(saving[:-1]) / loop_s, 4),
        "inside_the_step": round(sum(inside[1:]) / loop_s, 4),
    }


def measure_run(args) -> dict:
    """Returns the figures of a first and a second run with one compilation cache."""
    results = {}
    with tempfile.TemporaryDirectory() as temp:
        environ = os.environ | {"GIFT_JAX_CACHE": f"{temp}/cache"}
        for name in ("first", "second"):
            folder = pathlib.Path(temp) / name
            command = [sys.executable, __file__, f"--child={folder}"]
            command += [f"--steps={args.steps}", f"--config={args.config}"]
            subprocess.run(command, env=environ, check=True)
            results[name] = json.loads((folder / "figures.json").read_text())
    return results


# --- rematerialization ----------------------------------------------------------------


def measure_remat(args) -> dict:
    """Returns what a step costs with each `remat`, compiled side by side."""
    import jax

    from gift_jax.models.load import load_model
    from gift_jax.models.ops.kernels import CHOICES

    if not args.model:
        raise UserError("--model='' must be a folder of SD 1.5 for remat")
    model = load_model(args.model, "bfloat16")
    counts = {"safe": args.batch, "harmful": args.batch}
    pairs = workloads.gift_pairs(model, counts, model.latent_shape[-1])
    pairs, key = jax.device_put(pairs), jax.random.key(0)

    def compile_with(remat):
        kernels = dataclasses.replace(model.kernels, remat=remat)
        cfg = workloads.gift_config()
        step, state, frozen = workloads.gift_step(model.with_kernels(kernels), cfg)
        start = time.perf_counter()
        program = step.lower(state, frozen, pairs, key).compile()
        return program, state, frozen, time.perf_counter() - start

    with concurrent.futures.ThreadPoolExecutor() as threads:
        programs = dict(
            zip(
                CHOICES["remat"],
                threads.map(compile_with, CHOICES["remat"]),
                strict=True,
            )
        )
    results = {}
    for remat, (program, state, frozen, compile_s) in programs.items():
        memory, cost = program.memory_analysis(), program.cost_analysis()
        result = results[remat] = {
            "compile_s": round(compile_s, 1),
            "temporaries_GB": round(memory.temp_size_in_bytes / 1e9, 2),
            "TFLOP": round(cost.get("flops", 0) / 1e12, 2),
            "accessed_GB": round(cost.get("bytes accessed", 0) / 1e9, 1),
        }
        held = [state]

        def take(program=program, frozen=frozen, held=held):
            held[0], metrics = program(held[0], frozen, pairs, key)
            jax.block_until_ready(metrics)

        try:
            seconds = workloads.median_seconds(take, args.repeats)
            result["seconds"] = float(f"{seconds:.3g}")
            result["pairs_a_second"] = round(2 * args.batch / seconds, 1)
        except jax.errors.JaxRuntimeError as error:
            result["failed"] = str(error).splitlines()[0]
        print(json.dumps({remat: result}), file=sys.stderr, flush=True)
    return results


PARTS = {"defenses": measure_defenses, "run": measure_run, "remat": measure_remat}


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = flags.add_argument
    add("--parts", action="append", choices=PARTS, help="default: defenses")
    add("--only", action="append", choices=DEFENSES, help="of defenses (all)")
    add("--config", default=str(CONFIGS / "emoji_gift.py"), help="of run")
    add("--steps", type=int, default=300, help="of run (%(default)s)")
    add("--model", default="", help="a folder of SD 1.5, of remat")
    add("--batch", type=int, default=4, help="pairs of each group, of remat")
    add("--repeats", type=int, default=7, help="(%(default)s)")
    add("--child", help=argparse.SUPPRESS)
    args = flags.parse_args()
    at_least("--repeats", args.repeats, 1)
    at_least("--steps", args.steps, 3)
    at_least("--batch", args.batch, 1)
    if args.child:
        figures = run_and_time(args.child, args.config, args.steps)
        (pathlib.Path(args.child) / "figures.json").write_text(json.dumps(figures))
        return 0
    results = {part: PARTS[part](args) for part in args.parts or ("defenses",)}
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    cli.run_main(main)
