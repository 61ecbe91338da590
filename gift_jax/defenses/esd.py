# SPDX-License-Identifier: Apache-2.0
"""ESD: erases concepts by negative guidance (arXiv:2303.07345).

    eps_theta(z_t, t, c)  is to become  eps_0("") - eta * (eps_0(c) - eps_0(""))

at the same z_t and t, eps_0 being the frozen original's prediction: asked for the
concept c, the model moves away from it, as the original would with a guidance scale of
-eta. z_t lies on a guided DDIM trajectory towards c, at a random row of the table:

    current  of the model that is being trained, walked inside the step (the paper's);
    frozen   of the original, walked once before the loop, see `trajectories`.

The timestep is drawn in the row's interval (the paper's code) or is the row's own (the
authors' later code). That later code starts from eps_0(c) and has a scale of its own,
negative_guidance: eta is that minus 1, so its default 2 is the paper's 1.

The paper's code differs in one thing: its sampler leaves out the noisiest row and stops
two rows cleaner than the timestep says; here latents and timestep belong together.

A v_prediction model's outputs are converted to eps = sqrt(abar) v + sqrt(1 - abar) z_t,
so that one loss serves both kinds: the error in eps is sqrt(abar) times that in v.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gift_jax.diffusion import (
    Denoiser,
    at_least_float32,
    example_keys,
    per_example,
    squared_error,
    timesteps,
)
from gift_jax.models.trainable import merge_params
from gift_jax.sampling import sampler, schedules
from gift_jax.state import State, Step, global_norm
from gift_jax.training import sharding

SOURCES = ("frozen", "current")
TIMESTEPS = ("interval", "row")
# The published parameter sets as rules of `partition.RULES`. ESD-u of the authors'
# later code also trains the output convolution and the time embedding, but no norms.
TRAINABLE = {
    "esd-x": "cross_attention",
    "esd-u": "non_cross_attention",
    "esd-x-strict": "cross_attention_kv",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The choices of ESD; the defaults are the paper's, but for `source`.

    Attributes: eta: how far past the unconditional prediction, >= 0. source: of z_t, of
      SOURCES. steps: S, rows of the DDIM table. guidance: of the trajectory, >= 1.
      timestep: of TIMESTEPS.
    """

    eta: float = 1.0
    source: str = "frozen"
    steps: int = 50
    guidance: float = 3.0
    timestep: str = "interval"


def trajectories(
    model: Any,
    text_NLD: Any,
    empty_1LD: Any,
    key: jax.Array,
    s: Settings,
    batch: int = 8,
) -> dict[str, np.ndarray]:
    """Returns what the guided DDIM sampler of a model passes through, on the host.

    Args: model: a StableDiffusion, whose own parameters are used. text_NLD: float32
      "N L D", what trajectory n is guided towards; an array or a `pipeline.Repeated`.
      empty_1LD: float32 "1 L D", states of "". key: trajectory n draws its noise by n
      alone. batch: so many are walked at once, divided over this process's devices.
    Returns: z: float32 "N S C H W", scaled latents before each row of the table, the
      first pure noise (3.3 MB a trajectory of 50 rows at 512 pixels). t: int32 "S", the
      rows' timesteps, descending. end: float32 "N C H W", after the last row.
    Raises: UserError if the model's scheduler has no table of that many steps.
    Source: Song et al. 2021, arXiv:2010.02502; Gandikota et al. 2023, section 4.1.
    """
    table, clip = _table(model.scheduler_config, s)
    count = len(text_NLD)
    mesh, size = sampler.divide(min(batch, count))
    walk = _compiled(model.unet, clip, model.kernels.for_drawing(mesh))
    params, empty_1LD = sharding.replicate(mesh, (model.params["unet"], empty_1LD))
    z_NSCHW = np.empty((count, len(table.t), *model.latent_shape), np.float32)
    end_NCHW = np.empty((count, *model.latent_shape), np.float32)
    for some in sampler.in_batches(count, size):
        noise = sampler.numbered_latents(key, some, model.latent_shape)
        noise, text = sharding.put_batch(mesh, (noise, np.asarray(text_NLD[some])))
        end, before_SBCHW = walk(
            params,
            table,
            jnp.float32(s.guidance),
            noise,
            text,
            empty_1LD if s.guidance > 1 else None,
        )
        z_NSCHW[some] = np.moveaxis(np.asarray(before_SBCHW), 0, 1)
        end_NCHW[some] = end
    return {"z": z_NSCHW, "t": np.asarray(table.t), "end": end_NCHW}


def rows(z_NSCHW: np.ndarray) -> dict[str, np.ndarray]:
    """Returns every row of every trajectory as an example, the trajectories in turn.

    Args: z_NSCHW: see `trajectories`.
    Returns: z: "N*S C H W", a view. row: int32 "N*S", each one's row of the table.
      trajectory: int32 "N*S", n, which says whose text it goes with.
    """
    count, steps = z_NSCHW.shape[:2]
    return {
        "z": z_NSCHW.reshape(count * steps, *z_NSCHW.shape[2:]),
        "row": np.tile(np.arange(steps, dtype=np.int32), count),
        "trajectory": np.repeat(np.arange(count, dtype=np.int32), steps),
    }


def _table(scheduler_config: Mapping, s: Settings):
    table = schedules.schedule(scheduler_config, "ddim", s.steps)
    return table, schedules.clip_range(scheduler_config, "ddim")


@functools.lru_cache(maxsize=4)
def _compiled(unet, clip, kernels):
    def walk(params, table, guidance, z_BCHW, cond_BLD, uncond_1LD):
        return sampler.sample_latents(
            unet,
            params,
            table,
            clip,
            guidance,
            z_BCHW,
            cond_BLD,
            uncond_1LD,
            trace=True,
            kernels=kernels,
        )

    return jax.jit(walk)


def make_walk(denoiser: Denoiser, s: Settings, scheduler_config: Mapping) -> Callable:
    """Returns a guided DDIM sampler that stops each example at a row of its own.

    Returns: (unet parameters, z "B C H W", row int "B", text "B L D", empty "1 L D")
      -> the latents before that row, float32 "B C H W". Pure; it takes as many steps as
      the last of the rows asks for, at most S - 1, and has no reverse-mode gradient.
    """
    table, clip = _table(scheduler_config, s)
    table = jax.tree.map(jnp.asarray, table)

    def walk(unet, z_BCHW, row_B, text_BLD, empty_1LD):
        text = jnp.concatenate([jnp.broadcast_to(empty_1LD, text_BLD.shape), text_BLD])

        def body(i, x):
            row = jax.tree.map(lambda a: a[i], table)
            if s.guidance > 1:
                none, cond = _predict_twice(denoiser, unet, x, row.t, text)
                m = none + s.guidance * (cond - none)
            else:
                m = _predict(denoiser, unet, x, row.t, text_BLD)
            no_history = jnp.zeros((len(row.on_h), *x.shape), x.dtype)  # DDIM has none
            new, _ = sampler.advance(row, clip, x, x, no_history, m)
            return jnp.where(per_example(i < row_B, x), new, x)

        return jax.lax.fori_loop(0, jnp.max(row_B), body, z_BCHW)

    return walk


def _predict(denoiser, unet, z_BCHW, t, text_BLD):
    t_B = jnp.broadcast_to(t, (z_BCHW.shape[0],))
    out, _ = denoiser.predict(unet, z_BCHW, t_B, text_BLD, ())
    return at_least_float32(out)


def _predict_twice(denoiser, unet, z_BCHW, t, text_2BLD):
    """Returns the outputs for the first and for the second half of the text states."""
    t_B = jnp.broadcast_to(t, (z_BCHW.shape[0],))
    both = jnp.concatenate([z_BCHW, z_BCHW]), jnp.concatenate([t_B, t_B])
    return jnp.split(_predict(denoiser, unet, *both, text_2BLD), 2)


def noise_of(out_BCHW, z_t_BCHW, abar_B, prediction_type: str):
    """Returns the eps, "B C H W", that a UNet's output stands for.

    Args: out_BCHW: the output. z_t_BCHW: the noised latents it was made from. abar_B:
      cumulative alpha at each example's timestep.
    Raises: ValueError for a prediction type other than epsilon or v_prediction.
    Source: Salimans & Ho 2022, arXiv:2202.00512, section 4.
    """
    if prediction_type == "epsilon":
        return out_BCHW
    if prediction_type == "v_prediction":
        abar = per_example(abar_B, out_BCHW)
        return jnp.sqrt(abar) * out_BCHW + jnp.sqrt(1.0 - abar) * z_t_BCHW
    raise ValueError(
        f"prediction_type={prediction_type!r} is not epsilon or v_prediction"
    )


def make_target(denoiser: Denoiser, s: Settings) -> Callable:
    """Returns (frozen, batch) -> the eps to regress onto, float32 "B C H W".

    frozen, batch: see `make_loss`.
    Source: Gandikota et al. 2023, eq. 7, and the code it comes with.
    """

    def target(frozen, batch):
        z_t, t, text = batch["z"], batch["t"], batch["text"]
        original = merge_params(frozen["original"], frozen["unet"])
        empty = jnp.broadcast_to(frozen["empty"], text.shape)
        outs = _predict_twice(
            denoiser, original, z_t, t, jnp.concatenate([empty, text])
        )
        abar_B = frozen["abar"][t]
        none, cond = (
            noise_of(out, z_t, abar_B, denoiser.prediction_type) for out in outs
        )
        return none - s.eta * (cond - none)

    return target


def make_loss(denoiser: Denoiser, s: Settings) -> Callable:
    """Returns (params, frozen, batch) -> (mean square error in eps, metrics).

    params: trainable flat parameters. frozen: unet: the other flat parameters;
    original: the original's values of the trainable ones; abar: float32 "T"; empty:
    float32 "1 L D", text states of "". batch: z: float32 "B C H W", z_t itself; t: int
    "B"; text: float32 "B L D", each example's own concept.
    """
    target = make_target(denoiser, s)

    def loss(params, frozen, batch):
        z_t, t = batch["z"], batch["t"]
        wanted = jax.lax.stop_gradient(target(frozen, batch))
        unet = merge_params(params, frozen["unet"])
        out = _predict(denoiser, unet, z_t, t, batch["text"])
        eps = noise_of(out, z_t, frozen["abar"][t], denoiser.prediction_type)
        value = jnp.mean(squared_error(eps, wanted))
        return value, {"esd/loss": value}

    return loss


def timesteps_of_rows(key: jax.Array, row_B: jax.Array, total: int, s: Settings, t_S):
    """Returns int32 "B": each example's timestep at its row of the table.

    interval: uniform over T i / S .. T (i + 1) / S - 1, i = S - 1 - row, drawn per
    example; row: the table's own, t_S.
    """
    if s.timestep == "row":
        return jnp.asarray(t_S)[row_B]
    bounds = np.arange(s.steps + 1) * total // s.steps
    low, high = jnp.asarray(bounds[:-1][::-1]), jnp.asarray(bounds[1:][::-1])
    keys = example_keys(key, jnp.arange(row_B.shape[0]))
    draw = jax.vmap(lambda k, a, b: jax.random.randint(k, (), a, b))
    return draw(keys, low[row_B], high[row_B]).astype(jnp.int32)


def make_step(
    denoiser: Denoiser,
    s: Settings,
    tx: optax.GradientTransformation,
    scheduler_config: Mapping,
    latent_shape: tuple[int, int, int] | None = None,
) -> Step:
    """Returns ESD's step.

    state.params: trainable flat parameters; state.opt: {"upper": tx's}. frozen: see
    `make_loss`. batch: {"harmful": {"text": float32 "B L D"}}, and for source=frozen z
    and row of `rows`. The key depends on the base key and state.step only; every
    example draws by its place in the batch. Metrics: esd/loss, esd/grad_norm.

    Args: scheduler_config: the model's; gives the DDIM table. latent_shape: (C, H, W),
      needed by source=current alone.
    Raises: UserError for a bad number of steps; ValueError for an unknown source or
      timestep, or no latent_shape where it is needed.
    """
    for name, allowed in (("source", SOURCES), ("timestep", TIMESTEPS)):
        if getattr(s, name) not in allowed:
            raise ValueError(
                f"{name}={getattr(s, name)!r} must be one of {', '.join(allowed)}"
            )
    if s.source == "current" and latent_shape is None:
        raise ValueError("source='current' needs latent_shape")
    table, _ = _table(scheduler_config, s)
    walk = make_walk(denoiser, s, scheduler_config)
    grad_fn = jax.value_and_grad(make_loss(denoiser, s), has_aux=True)

    def examples(params, frozen, pairs, key):
        k_noise, k_row, k_t = jax.random.split(key, 3)
        text = pairs["text"]
        if s.source == "frozen":
            z, row = pairs["z"], pairs["row"]
        else:
            row = timesteps(k_row, text.shape[0], s.steps)
            noise = sampler.initial_latents(k_noise, text.shape[0], latent_shape)
            unet = merge_params(params, frozen["unet"])
            z = walk(unet, noise, row, text, frozen["empty"])
        t = timesteps_of_rows(k_t, row, denoiser.train_timesteps, s, table.t)
        return {"z": z, "t": t, "text": text}

    def esd_step(state: State, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        batch = examples(state.params, frozen, batch["harmful"], key)
        (_, metrics), grads = grad_fn(state.params, frozen, batch)
        updates, opt = tx.update(grads, state.opt["upper"], state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {"esd/grad_norm": global_norm(grads)}
        state = state.replace(step=state.step + 1, params=params, opt={"upper": opt})
        return state, metrics

    return esd_step
