# SPDX-License-Identifier: Apache-2.0
"""What does a step of each method cost on emoji-sd, next to GIFT's first-order step?

    python perf/step_cost.py --repeats 7

Every step is the one that gift_jax.train takes with that config, on the same pairs.
They take turns in one process. Prints the median seconds a step, the memory that the
compiled step plans for (arguments, results and temporaries), and both as ratios to the
first line.
"""

import argparse
import json
import statistics
import time

import jax

from gift_jax.data import cache
from gift_jax.defenses import base as defenses_base
from gift_jax.models.load import load_model
from gift_jax.models.sd import stable_diffusion
from gift_jax.runtime.config import load_config
from gift_jax.sampling.generated import load_group
from gift_jax.state import init_state, run_key
from gift_jax.training import loop, setup, sharding

BASELINES = "configs/emoji_baselines.py"
GIFT = "configs/emoji_gift.py"
PLAIN = f"{GIFT}:plain"  # one update of each level, on data
MODEL = {"gift.preserve": "model"}
FULL = {"adversary.kinds": ("full",)}  # one update, from the start at every step
STEPS = {  # name: (config, changes)
    "first_order": (PLAIN, {}),
    "unrolled": (PLAIN, {"gift.gradient": "unrolled"}),
    "joint": (PLAIN, {"gift.gradient": "joint"}),
    "preserve=model": (PLAIN, MODEL),
    "the same, 2 inner_steps": (PLAIN, MODEL | {"gift.inner_steps": 2}),
    "emoji_gift.py": (GIFT, {}),
    "adversary": (PLAIN, FULL | {"adversary.horizon": 30}),
    "adversary, 1 full update": (PLAIN, FULL),
    "the same, unrolled": (PLAIN, FULL | {"adversary.unrolled": True}),
    "maximize_prior": (f"{BASELINES}:maximize_prior", {}),
    "maximize": (f"{BASELINES}:maximize", {}),
    "imma": (f"{BASELINES}:imma", {}),
    "imma, lora": (f"{BASELINES}:imma_lora", {}),
    "esd": (f"{BASELINES}:esd", {"esd.trajectories": 6}),
}


def make(name: str, model):
    """Returns (a function that takes one step and waits, bytes that it plans for)."""
    file, changes = STEPS[name]
    cfg = load_config(file)
    cfg.update_from_flattened_dict(changes | {"safe.names": ("cat face",)})
    method = defenses_base.DEFENSES[cfg.method]
    mesh = sharding.make_default_mesh(1)
    data, sources = {}, {}
    for group in method.groups:
        data[group] = load_group(model, cfg[group], group, model.image_size)
        k_cache = run_key(cfg, f"defence/cache/{group}")
        sources[group] = cache.cached_source(model, data[group], cfg[group], k_cache)
    plan = method.plan(cfg, method.check(cfg), model, data, sources)
    sources = {group: (sources | plan.sources)[group] for group in plan.sizes}
    batch = next(setup.batches(sources, plan.sizes, cfg, "defence"))
    abar = stable_diffusion.noise_schedule(model)
    frozen = {"unet": plan.frozen, "abar": abar, **plan.also_frozen}
    params = jax.tree.map(jax.numpy.array, plan.params)  # the step donates them
    state = sharding.replicate(mesh, init_state(params, plan.opt))
    rest = sharding.replicate(mesh, (frozen, batch, run_key(cfg, "defence/steps")))
    compiled = loop.compile_step(plan.step).lower(state, *rest).compile()
    use = compiled.memory_analysis()
    planned = use.argument_size_in_bytes + use.output_size_in_bytes
    planned += use.temp_size_in_bytes - use.alias_size_in_bytes
    held = [state]

    def run():
        held[0], metrics = compiled(held[0], *rest)
        jax.block_until_ready(metrics)

    return run, planned


def measure(names, repeats: int) -> dict[str, dict[str, float]]:
    """Returns name -> seconds and bytes of a step; the steps take turns."""
    model = load_model("emoji-sd")
    made = {}
    for name in names:
        made[name] = make(name, model)
        made[name][0]()  # warm
        print(f"compiled {name}", flush=True)
    times = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            began = time.perf_counter()
            made[name][0]()
            times[name].append(time.perf_counter() - began)
    return {
        name: {"seconds": statistics.median(times[name]), "bytes": made[name][1]}
        for name in names
    }


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--repeats", type=int, default=7, help="default: %(default)s")
    flags.add_argument("--only", nargs="*", default=list(STEPS), choices=list(STEPS))
    args = flags.parse_args()
    found = measure(args.only, args.repeats)
    first = found[args.only[0]]
    print("| step | s | ratio | MB | ratio |")
    print("| --- | --- | --- | --- | --- |")
    for name, one in found.items():
        ratios = {key: one[key] / first[key] for key in one}
        print(
            f"| {name} | {one['seconds']:.3f} | {ratios['seconds']:.2f} "
            f"| {one['bytes'] / 1e6:.0f} | {ratios['bytes']:.2f} |"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
