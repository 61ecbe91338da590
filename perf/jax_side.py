# SPDX-License-Identifier: Apache-2.0
"""This package's side of perf/vs_pytorch.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import workloads

from gift_jax.diffusion import squared_error
from gift_jax.models.load import load_model
from gift_jax.runtime.devices import num_cores
from gift_jax.sampling import sampler
from gift_jax.state import apply_gradients
from gift_jax.training import sharding

FAILURES = ()  # that are of a part alone


def build(part: str, folder: str, dtype: str, batch: int):
    """Returns a function that does the part's work once and waits for it."""
    mesh = sharding.make_default_mesh(num_cores() if part.startswith("emoji") else 1)
    model = load_model(folder, dtype)
    if part == "emoji-sampling":
        return _sampling(model, mesh)
    if part == "emoji-step":
        return _training(model, mesh)
    cfg = workloads.gift_config()
    side = workloads.latent_side(part) or model.latent_shape[-1]
    step, state, frozen = workloads.gift_step(model, cfg)
    state, frozen = sharding.replicate(mesh, (state, frozen))
    counts = workloads.pair_counts(part, cfg, batch)
    pairs = sharding.put_batch(mesh, workloads.gift_pairs(model, counts, side))
    key = sharding.replicate(mesh, jax.random.key(0))
    del model  # but for what is frozen

    def run():
        nonlocal state
        state, metrics = step(state, frozen, pairs, key)
        jax.block_until_ready((state, metrics))

    return run


def _training(model, mesh):
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


def _sampling(model, mesh):
    count, steps = len(workloads.PROMPTS), workloads.SAMPLING_STEPS
    sample = sampler.make_sampler(model, "ddim", steps, workloads.GUIDANCE, mesh=mesh)
    text = model.encode_text(list(workloads.PROMPTS))
    params = model.params["unet"], model.params["vae"]
    params, empty = sharding.replicate(mesh, (params, model.encode_text([""])))
    text = sharding.put_batch(mesh, text)

    def run():
        noise = sampler.initial_latents(jax.random.key(0), count, model.latent_shape)
        noise = sharding.put_batch(mesh, noise)
        np.asarray(sample(*params, text, empty, noise))

    return run


def device_name() -> str:
    return jax.devices()[0].device_kind


def peak_bytes() -> int:
    """Returns the most memory of the GPU that was used; 0 where there is none."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
