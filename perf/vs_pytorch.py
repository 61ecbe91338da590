# SPDX-License-Identifier: Apache-2.0
"""How fast is this package on this machine, next to PyTorch?

    python perf/vs_pytorch.py --parts emoji-step --parts emoji-sampling
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

Eager PyTorch and diffusers, the same weights, batch and cores or GPU, each in a process
of its own, taking turns; one prepares and warms up while the other waits. Both sides in
float32 (on a GPU with TF32 products, as is JAX's default), the sd15 parts also in
bfloat16: what does not train is kept in 16 bits, PyTorch's side with autocast. Prints
one JSON object: seconds (median), their ratio, peak memory (the GPU's where there is
one), and page faults of a run, a mean: many thousands say that the heap grew in one of
them, or that memory is given back. Without --model the sd15 parts write a random one
first. Needs torch (`pip install 'gift_jax[test]'`); the sd15 parts
need 20 GB of memory.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import workloads

from gift_jax.runtime import cli
from gift_jax.runtime.errors import UserError, at_least

SIDES = ("gift_jax", "pytorch")
PARTS = (
    *("sd15-step-32", "sd15-step-64", "sd15-encode-32", "sd15-encode-64"),
    *("emoji-step", "emoji-gift", "emoji-sampling"),
)
IMAGES, STEPS, GUIDANCE = 24, 25, 3.0
PROMPTS = ["a noto emoji of a guitar"] * IMAGES
WARM_UP = {"sd15": 2, "emoji": 10}  # until memory has settled


def sizes(part: str, cfg, batch: int = 1) -> dict[str, int]:
    """Returns the pairs of each level. Args: batch: those of the sd15 parts."""
    if part.startswith("sd15"):
        return {"safe": batch, "harmful": batch}
    return {group: cfg[group].batch for group in ("safe", "harmful")}


def latent_side(part: str) -> int:
    """Returns the side of the latents, 0: the model's own."""
    return int(part[-2:]) if part.startswith("sd15") else 0


# --- this package ---------------------------------------------------------------------


def our_side(part: str, folder: str, dtype: str, batch: int):
    """Returns a function that does the part's work once and waits for it."""
    import jax

    from gift_jax.models.load import load_model
    from gift_jax.runtime.devices import num_cores
    from gift_jax.training import sharding

    mesh = sharding.make_default_mesh(num_cores() if part.startswith("emoji") else 1)
    model = load_model(folder, dtype)
    if part == "emoji-sampling":
        return _our_sampling(model, mesh)
    if part == "emoji-step":
        return _our_training(model, mesh)
    cfg = workloads.gift_config()
    side = latent_side(part) or model.latent_shape[-1]
    step, state, frozen = workloads.gift_step(model, cfg)
    state, frozen = sharding.replicate(mesh, (state, frozen))
    pairs = workloads.gift_pairs(model, sizes(part, cfg, batch), side)
    pairs = sharding.put_batch(mesh, pairs)
    key = sharding.replicate(mesh, jax.random.key(0))
    del model  # but for what is frozen

    def run():
        nonlocal state
        state, metrics = step(state, frozen, pairs, key)
        jax.block_until_ready((state, metrics))

    return run


def _our_training(model, mesh):
    import jax
    import jax.numpy as jnp
    import optax

    from gift_jax.diffusion import squared_error
    from gift_jax.state import apply_gradients
    from gift_jax.training import sharding

    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    denoiser, text = model.denoiser, workloads.text_shape(model)
    batch = workloads.training_batch(model.latent_shape, text)

    def loss_fn(params, batch):
        cond = {"states": batch["states"]}
        out, _ = denoiser.predict(params, batch["z_t"], batch["t"], cond, ())
        return jnp.mean(squared_error(out, batch["eps"]))

    def step(params, opt, batch):
        return apply_gradients(tx, jax.grad(loss_fn)(params, batch), params, opt)

    params = sharding.replicate(mesh, model.params["unet"])
    state = [params, sharding.replicate(mesh, tx.init(params))]
    batch = sharding.put_batch(mesh, batch)
    compiled = jax.jit(step, donate_argnums=(0, 1))

    def run():
        state[:] = compiled(*state, batch)
        jax.block_until_ready(state)

    return run


def _our_sampling(model, mesh):
    import jax

    from gift_jax.sampling import sampler
    from gift_jax.training import sharding

    sample = sampler.make_sampler(model, "ddim", STEPS, GUIDANCE, mesh=mesh)
    text, empty = model.encode_text(PROMPTS), model.encode_text([""])
    params = model.params["unet"], model.params["vae"]
    params, empty = sharding.replicate(mesh, (params, empty))
    text = sharding.put_batch(mesh, text)

    def run():
        noise = sampler.initial_latents(jax.random.key(0), IMAGES, model.latent_shape)
        noise = sharding.put_batch(mesh, noise)
        np.asarray(sample(*params, text, empty, noise))

    return run


def their_side(part: str, folder: str, dtype: str, batch: int):
    """Returns the same for PyTorch and diffusers."""
    import pytorch_side

    pytorch_side.start()
    if part == "emoji-sampling":
        return pytorch_side.sampling(folder, PROMPTS, STEPS, GUIDANCE)
    if part == "emoji-step":
        return pytorch_side.training(folder)
    cfg = workloads.gift_config()
    counts, side = sizes(part, cfg, batch), latent_side(part)
    return pytorch_side.Gift(folder, cfg, counts, side, "encode" in part, dtype)


# --- taking turns ---------------------------------------------------------------------


def serve(side: str, part: str, folder: str, dtype: str, batch: int) -> None:
    """Does the work once for every line that comes, and says how long it took."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    run = {"gift_jax": our_side, "pytorch": their_side}[side](
        part, folder, dtype, batch
    )
    for _ in range(WARM_UP[part.split("-")[0]]):
        run()
    print(f"ready on {_device(side)}", file=answers, flush=True)
    before, runs = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, 0
    for _ in sys.stdin:
        clock = time.perf_counter()
        run()
        print(time.perf_counter() - clock, file=answers, flush=True)
        runs += 1
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(_peak_gb(side), faults // max(1, runs), file=answers, flush=True)


def _device(side: str) -> str:
    if side == "gift_jax":
        import jax

        return jax.devices()[0].device_kind
    import pytorch_side

    return pytorch_side.device_name()


def _peak_gb(side: str) -> float:
    """Returns the most memory that the process has held: the GPU's, or its own."""
    if side == "gift_jax":
        import jax

        stats = jax.devices()[0].memory_stats() or {}
        peak = stats.get("peak_bytes_in_use", 0)
    else:
        import pytorch_side

        peak = pytorch_side.peak_bytes()
    peak = peak or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 1e9, 2)


def measure(part: str, folder: str, repeats: int, dtype: str, batch: int) -> dict:
    """Returns seconds, ratio and memory of both sides of one part."""
    children, devices = {}, {}
    environ = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"} | os.environ  # a GPU's, shared
    for side in SIDES:
        command = [sys.executable, __file__, f"--side={side}", f"--parts={part}"]
        children[side] = subprocess.Popen(
            [*command, f"--model={folder}", f"--dtype={dtype}", f"--batch={batch}"],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        answer = children[side].stdout.readline().strip()
        devices[side] = answer.removeprefix("ready on ")
        if answer == devices[side]:
            raise UserError(f"{part}, {side} failed; its error is above")
    seconds = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side, child in children.items():
            print("go", file=child.stdin, flush=True)
            seconds[side].append(float(child.stdout.readline()))
    peak, faults = {}, {}
    for side, child in children.items():
        child.stdin.close()
        gigabytes, count = child.stdout.readline().split()
        peak[side], faults[side] = float(gigabytes), int(count)
        child.wait()
    median = {side: statistics.median(s) for side, s in seconds.items()}
    spread = {side: [round(min(s), 4), round(max(s), 4)] for side, s in seconds.items()}
    return {
        "times_as_fast_as_pytorch": round(median["pytorch"] / median["gift_jax"], 2),
        "seconds": {side: round(s, 4) for side, s in median.items()},
        "range": spread,
        "peak_GB": peak,
        "page_faults": faults,
        "device": devices,
    }


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--parts", action="append", choices=PARTS, help="default: all")
    flags.add_argument("--model", default="", help="a folder of SD 1.5")
    flags.add_argument("--repeats", type=int, default=7)
    flags.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of sd15"
    )
    flags.add_argument("--batch", type=int, default=1, help="pairs a level, of sd15")
    flags.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = flags.parse_args()
    at_least("--repeats", args.repeats, 1)
    at_least("--batch", args.batch, 1)
    if args.side:
        serve(args.side, args.parts[0], args.model, args.dtype, args.batch)
        return 0
    from gift_jax.models.load import EMBEDDED

    parts = args.parts or PARTS
    results = {"processor": workloads.processor(), "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as temp:
        for part in parts:
            folder, dtype = str(EMBEDDED), "float32"
            if part.startswith("sd15"):
                folder = args.model or _random_model(pathlib.Path(temp) / "sd15")
                dtype = args.dtype
            results[part] = measure(part, folder, args.repeats, dtype, args.batch)
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
