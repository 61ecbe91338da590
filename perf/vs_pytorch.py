# SPDX-License-Identifier: Apache-2.0
"""How fast is this package on this machine, next to PyTorch?

    python perf/vs_pytorch.py --parts emoji-step --parts emoji-sampling
    python perf/vs_pytorch.py --model runs/sd15 --parts sd15-step-32 --repeats 5
    python perf/vs_pytorch.py --parts sd15-step-64 --dtype bfloat16 --batch 4

Parts:
  sd15-step-32, -64     GIFT's outer step (a lower and an upper update of the
                        cross-attention, --batch pairs each, representation noising)
                        on latents of that side, from cached latents and text states
  sd15-encode-32, -64   the same, PyTorch's side encoding the picture and the prompt
                        anew in every update, as the published IMMA script does
  emoji-step            a pretraining step of emoji-sd's UNet, batch of 64
  emoji-gift            GIFT's outer step on emoji-sd, 12 malicious and 24 safe pairs
  emoji-sampling        24 pictures of emoji-sd, 25 DDIM steps, guided, decoded

Eager PyTorch and diffusers, the same weights, batch and cores or GPU, each in a process
of its own, taking turns; one prepares and warms up while the other waits. Both sides in
float32 (on a GPU with TF32 products, as is JAX's default), the sd15 parts also in
bfloat16: what does not train is kept in 16 bits, PyTorch's side with autocast. Prints
one JSON object: seconds (median), their ratio, peak memory (the GPU's where there is
one), and page faults of a run, a mean: many thousands say that the heap grew in one of
them, or that memory is given back. Without --model the sd15 parts write a random one
first (see random_sd.py). Needs torch (`pip install 'gift_jax[test]'`); the sd15 parts
need 20 GB of memory.
"""

import argparse
import json
import os
import pathlib
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from gift_jax.runtime import cli
from gift_jax.runtime.config import load_config
from gift_jax.runtime.errors import UserError, at_least

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIDES = ("gift_jax", "pytorch")
PARTS = (
    *("sd15-step-32", "sd15-step-64", "sd15-encode-32", "sd15-encode-64"),
    *("emoji-step", "emoji-gift", "emoji-sampling"),
)
BATCH, PICTURES, STEPS, GUIDANCE = 64, 24, 25, 3.0
PROMPT = "a noto emoji of a guitar"
WARM_UP = {"sd15": 2, "emoji": 10}  # until memory has settled


def gift_config():
    """Returns the config of both sides' outer step: configs/emoji_gift.py:plain."""
    return load_config(str(ROOT / "configs" / "emoji_gift.py:plain"))


def sizes(part: str, cfg, batch: int = 1) -> dict[str, int]:
    """Returns the pairs of each level. Args: batch: those of the sd15 parts."""
    if part.startswith("sd15"):
        return {"safe": batch, "harmful": batch}
    return {group: cfg[group].batch for group in ("safe", "harmful")}


def random_pairs(count: int, latents: tuple, text: tuple) -> dict[str, np.ndarray]:
    """Returns cached pairs, as `Denoiser.losses` takes them."""
    rng = np.random.default_rng(0)
    return {
        "mean": rng.normal(size=(count, *latents)).astype(np.float32),
        "std": rng.uniform(0.01, 0.1, size=(count, *latents)).astype(np.float32),
        "text": rng.normal(size=(count, *text)).astype(np.float32),
    }


# --- this package ---------------------------------------------------------------------


def ours(part: str, folder: str, dtype: str, batch: int):
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
    cfg = gift_config()
    side = int(part[-2:]) if part.startswith("sd15") else model.latent_shape[-1]
    step, state, frozen = gift_step(model, cfg)
    state, frozen = sharding.replicate(mesh, (state, frozen))
    pairs = sharding.put_batch(mesh, gift_pairs(model, sizes(part, cfg, batch), side))
    key = sharding.replicate(mesh, jax.random.key(0))
    del model  # but for what is frozen

    def run():
        nonlocal state
        state, metrics = step(state, frozen, pairs, key)
        jax.block_until_ready((state, metrics))

    return run


def gift_pairs(model, counts: dict[str, int], side: int):
    """Returns every group's cached pairs, the latents' sides so many wide."""
    latents = model.latent_shape[0], side, side
    text = model.max_length, _width(model)
    return {group: random_pairs(n, latents, text) for group, n in counts.items()}


def gift_step(model, cfg):
    """Returns (GIFT's compiled outer step, state, frozen), as `gift_jax.train` has."""
    from gift_jax import train
    from gift_jax.defenses import gift
    from gift_jax.models.load import make_denoiser, split_unet
    from gift_jax.models.sd import stable_diffusion
    from gift_jax.state import init_state
    from gift_jax.training import loop
    from gift_jax.training.optimizer import make_optimizer

    settings = train.check(cfg)
    tx = {level: make_optimizer(cfg[level], cfg.steps, level) for level in LEVELS}
    parts = split_unet(model, "cross_attention")
    opt = {level: tx[level].init(parts.trainable) for level in LEVELS}
    state = init_state(parts.trainable, opt)
    abar = stable_diffusion.noise_schedule(model)
    step = gift.make_step(make_denoiser(model), settings, tx["lower"], tx["upper"])
    return loop.compile_step(step), state, {"unet": parts.frozen, "abar": abar}


LEVELS = ("lower", "upper")


def _our_training(model, mesh):
    import jax
    import jax.numpy as jnp
    import optax

    from gift_jax.diffusion import squared_error
    from gift_jax.models import sd
    from gift_jax.training import sharding

    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    d = training_batch(model.latent_shape, model.max_length, model)

    def loss_fn(params, d):
        out, _ = sd.apply_unet(model.unet, params, d["z_t"], d["t"], d["text"])
        return jnp.mean(squared_error(out, d["eps"]))

    def step(params, opt, d):
        grads = jax.grad(loss_fn)(params, d)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt

    params = sharding.replicate(mesh, model.params["unet"])
    state = [params, sharding.replicate(mesh, tx.init(params))]
    d = sharding.put_batch(mesh, d)
    compiled = jax.jit(step, donate_argnums=(0, 1))

    def run():
        state[:] = compiled(*state, d)
        jax.block_until_ready(state)

    return run


def training_batch(latents: tuple, length: int, model) -> dict[str, np.ndarray]:
    """Returns random latents, timesteps, text states and noise of one step."""
    rng = np.random.default_rng(0)
    shape, text = (BATCH, *latents), (BATCH, length, _width(model))
    return {
        "z_t": rng.normal(size=shape).astype(np.float32),
        "t": rng.integers(0, 1000, BATCH).astype(np.int32),
        "text": rng.normal(size=text).astype(np.float32),
        "eps": rng.normal(size=shape).astype(np.float32),
    }


def _width(model) -> int:
    return model.text_encoder.config.hidden_size


def _our_sampling(model, mesh):
    import jax

    from gift_jax.models.sd import stable_diffusion
    from gift_jax.sampling import sampler
    from gift_jax.training import sharding

    draw = sampler.make_sampler(model, "ddim", STEPS, GUIDANCE)
    states = stable_diffusion.encode_prompts(model, [PROMPT] * PICTURES + [""])
    params = model.params["unet"], model.params["vae"]
    params, empty = sharding.replicate(mesh, (params, states[-1:]))
    text = sharding.put_batch(mesh, states[:-1])

    def run():
        noise = sampler.initial_latents(jax.random.key(0), PICTURES, model.latent_shape)
        np.asarray(draw(*params, text, empty, sharding.put_batch(mesh, noise)))

    return run


# --- PyTorch --------------------------------------------------------------------------


def theirs(part: str, folder: str, dtype: str, batch: int):
    """Returns the same for PyTorch and diffusers, eager, on all cores or the GPU."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    torch.backends.cuda.matmul.allow_tf32 = True  # as is JAX's default
    torch.set_default_device(_torch_device())
    torch.manual_seed(0)
    if part == "emoji-sampling":
        return _their_sampling(folder)
    if part == "emoji-step":
        return _their_training(folder)
    return _their_gift(part, folder, dtype, batch)


def _torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _wait_for_torch() -> None:
    import torch

    if _torch_device() == "cuda":
        torch.cuda.synchronize()


def _their_pipeline(folder: str):
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, safety_checker=None
    ).to(_torch_device())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _their_sampling(folder: str):
    from diffusers import DDIMScheduler

    pipe = _their_pipeline(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

    def run():
        pipe(
            [PROMPT] * PICTURES,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            output_type="np",
        )  # on the host, and so waited for

    return run


def _their_training(folder: str):
    import torch

    pipe = _their_pipeline(folder)
    unet = pipe.unet.train()
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3)
    side = unet.config.sample_size
    latents = (unet.config.in_channels, side, side)
    length = pipe.tokenizer.model_max_length
    d = {
        name: torch.tensor(array)
        for name, array in training_batch(latents, length, pipe).items()
    }

    def run():
        optimizer.zero_grad()
        out = unet(d["z_t"], d["t"].long(), d["text"]).sample
        torch.nn.functional.mse_loss(out, d["eps"]).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        _wait_for_torch()

    return run


def _their_gift(part: str, folder: str, dtype: str, batch: int):
    """GIFT's outer step, straightforwardly."""
    import torch
    from diffusers.models.attention import BasicTransformerBlock

    cfg, pipe = gift_config(), _their_pipeline(folder)
    unet, vae, text_encoder = pipe.unet, pipe.vae, pipe.text_encoder
    for module in (unet, vae, text_encoder):
        module.requires_grad_(False).to(getattr(torch, dtype))
    trained = [p for name, p in unet.named_parameters() if ".attn2." in name]
    for parameter in trained:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    mixed = torch.autocast(_torch_device(), torch.bfloat16, enabled=dtype == "bfloat16")
    optimizers = {level: torch.optim.AdamW(trained, cfg[level].lr) for level in LEVELS}
    hiddens, watched = (
        [],
        [
            module
            for module in unet.modules()
            if isinstance(module, BasicTransformerBlock)
        ],
    )
    abar = pipe.scheduler.alphas_cumprod.to(_torch_device())
    length, width = pipe.tokenizer.model_max_length, text_encoder.config.hidden_size
    sd15 = part.startswith("sd15")
    side = int(part[-2:]) if sd15 else unet.config.sample_size
    shape = (unet.config.in_channels, side, side)
    pairs = {
        group: {
            k: torch.tensor(a)
            for k, a in random_pairs(n, shape, (length, width)).items()
        }
        for group, n in sizes(part, cfg, batch).items()
    }
    anew = "encode" in part
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    picture = torch.rand(batch, 3, side * factor, side * factor) * 2 - 1

    @mixed
    def losses(group):
        pair = pairs[group]
        if anew:
            with torch.no_grad():
                z = (
                    vae.encode(picture.to(vae.dtype)).latent_dist.sample()
                    * vae.config.scaling_factor
                )
                ids = pipe.tokenizer(
                    ["a photo of sks purse"] * batch,
                    padding="max_length",
                    max_length=length,
                    truncation=True,
                    return_tensors="pt",
                ).input_ids.to(_torch_device())
                text = text_encoder(ids)[0]
        else:
            z = pair["mean"] + pair["std"] * torch.randn_like(pair["mean"])
            text = pair["text"]
        eps = torch.randn_like(z)
        t = torch.randint(0, 1000, (len(z),))
        signal = abar[t].view(-1, 1, 1, 1)
        z_t = signal.sqrt() * z + (1 - signal).sqrt() * eps
        out = unet(z_t, t, text).sample
        return (out.float() - eps).square().flatten(1).mean(1)

    def update(level, loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, cfg[level].clip_norm)
        optimizers[level].step()
        optimizers[level].zero_grad()
        return float(loss.detach())

    def run():
        update("lower", losses("safe").mean())
        hiddens.clear()
        handles = [
            module.register_forward_hook(lambda _, __, out: hiddens.append(out))
            for module in watched
        ]
        loss = losses("harmful")
        for handle in handles:
            handle.remove()
        noising = 0.0
        for h in hiddens:
            h = h.float()
            fixed = h.detach()
            std, mean = torch.std_mean(fixed, (0, 1), correction=0, keepdim=True)
            noise = mean + std * torch.randn_like(fixed)
            noising = noising + (h - noise).square().mean()
        ascent = -torch.clamp(loss, max=cfg.gift.cap).mean()
        update("upper", ascent + cfg.gift.beta * noising / len(hiddens))
        _wait_for_torch()

    return run


# --- taking turns ---------------------------------------------------------------------


def serve(side: str, part: str, folder: str, dtype: str, batch: int) -> None:
    """Does the work once for every line that comes, and says how long it took."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    run = {"gift_jax": ours, "pytorch": theirs}[side](part, folder, dtype, batch)
    run()
    for _ in range(WARM_UP[part.split("-")[0]] - 1):
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
    import torch

    return torch.cuda.get_device_name() if _torch_device() == "cuda" else "cpu"


def processor() -> str:
    """Names the CPU, on which the ratios depend.

    Virtual machines hide the product's name, so family, model and stepping follow.
    """
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    told = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    name = told.get("model name") or platform.machine()
    fields = ("cpu family", "model", "stepping")
    return ", ".join([name, *(f"{f} {told[f]}" for f in fields if f in told)])


def _peak_gb(side: str) -> float:
    """Returns the most memory that the process has held: the GPU's, or its own."""
    if side == "gift_jax":
        import jax

        stats = jax.devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            return round(stats["peak_bytes_in_use"] / 1e9, 2)
    elif _torch_device() == "cuda":
        import torch

        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return round(1024 * int(line.split()[1]) / 1e9, 2)
    return float("nan")


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
        said = children[side].stdout.readline().strip()
        devices[side] = said.removeprefix("ready on ")
        if said == devices[side]:
            raise UserError(f"{part}, {side} failed; its error is above")
    seconds = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side, child in children.items():
            print("go", file=child.stdin, flush=True)
            seconds[side].append(float(child.stdout.readline()))
    peak, faults = {}, {}
    for side, child in children.items():
        child.stdin.close()
        told = child.stdout.readline().split()
        peak[side], faults[side] = float(told[0]), int(told[1])
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
    found = {"processor": processor(), "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as temp:
        for part in parts:
            folder, dtype = str(EMBEDDED), "float32"
            if part.startswith("sd15"):
                folder = args.model or _random_model(pathlib.Path(temp) / "sd15")
                dtype = args.dtype
            found[part] = measure(part, folder, args.repeats, dtype, args.batch)
            print(json.dumps({part: found[part]}), file=sys.stderr, flush=True)
    print(json.dumps(found, indent=1))
    return 0


def _random_model(folder: pathlib.Path) -> str:
    import random_sd

    if not folder.exists():
        random_sd.write(folder, random_sd.MODELS["sd15"], "float16")
    return str(folder)


if __name__ == "__main__":
    cli.run_main(main)
