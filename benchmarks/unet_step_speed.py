# SPDX-License-Identifier: Apache-2.0
"""How fast is a pretraining step of emoji-sd's UNet, next to PyTorch's on this machine?

    python benchmarks/unet_step_speed.py --repeats 5

Both sides: the same UNet, batch, loss, clipping and AdamW in float32, no averaging of
weights, in turn in one process. Prints seconds a step (median) and their ratio. Needs
torch (`pip install gift_jax[test]`).
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gift_jax import config, job, losses, sharding
from gift_jax.models import hooks, stable_diffusion


def draw(model, batch: int, rng) -> dict[str, np.ndarray]:
    """Returns random latents, timesteps, text states and noise for one step."""
    shape = (batch, *model.latent_shape)
    text_shape = stable_diffusion.encode_prompts(model, [""]).shape[1:]
    return {
        "z_t": rng.normal(size=shape).astype(np.float32),
        "t": rng.integers(0, 1000, batch).astype(np.int32),
        "text": rng.normal(size=(batch, *text_shape)).astype(np.float32),
        "eps": rng.normal(size=shape).astype(np.float32),
    }


def make_ours(model, data, mesh):
    """Returns a function that takes one training step and waits for it."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

    def loss_fn(params, d):
        out, _ = hooks.apply_unet(model.unet, params, d["z_t"], d["t"], d["text"])
        return jnp.mean(losses.squared_error(out, d["eps"]))

    def step(params, opt, d):
        grads = jax.grad(loss_fn)(params, d)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt

    params = sharding.replicate(mesh, model.params["unet"])
    state = [params, sharding.replicate(mesh, tx.init(params))]
    data = sharding.split(mesh, data)
    compiled = jax.jit(step, donate_argnums=(0, 1))

    def run():
        state[:] = compiled(*state, data)
        jax.block_until_ready(state)

    return run


def make_theirs(model, data, folder):
    """Returns the same for PyTorch diffusers, eager, on all cores."""
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3)
    d = {name: torch.tensor(array) for name, array in data.items()}

    def run():
        optimizer.zero_grad()
        out = unet(d["z_t"], d["t"].long(), d["text"]).sample
        torch.nn.functional.mse_loss(out, d["eps"]).backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()

    return run


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--model", default="emoji-sd")
    flags.add_argument("--batch", type=int, default=64)
    flags.add_argument("--repeats", type=int, default=5)
    args = flags.parse_args()
    config.at_least("--batch", args.batch, 1)
    config.at_least("--repeats", args.repeats, 1)
    mesh = sharding.start(2 if args.batch % 2 == 0 else 1)
    model = job.load_model(args.model)
    data = draw(model, args.batch, np.random.default_rng(0))
    sides = {
        "gift_jax": make_ours(model, data, mesh),
        "pytorch": make_theirs(model, data, model.path / "unet"),
    }
    seconds = {name: [] for name in sides}
    for step in range(args.repeats + 1):
        for name, run in sides.items():
            clock = time.perf_counter()
            run()
            if step:  # the first one compiles
                seconds[name].append(time.perf_counter() - clock)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    result = {
        "batch": args.batch,
        "seconds_a_step": {name: round(s, 4) for name, s in median.items()},
        "examples_a_second": {n: round(args.batch / s, 1) for n, s in median.items()},
        "times_as_fast_as_pytorch": round(median["pytorch"] / median["gift_jax"], 2),
    }
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    config.run_main(main)
