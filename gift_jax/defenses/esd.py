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

Outputs that are not eps are converted to it (`NoiseProcess.noise_of`), so that one loss
serves every kind: the error in eps is sqrt(abar) times that in the v of a v_prediction
model, and 1 - sigma times that in the velocity of flow matching.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from gift_jax.data import pipeline
from gift_jax.defenses import base
from gift_jax.diffusion import (
    Denoiser,
    NoiseProcess,
    at_least_float32,
    per_example,
    squared_error,
    timesteps,
)
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError
from gift_jax.sampling import sampler, schedules
from gift_jax.state import Step, apply_gradients, global_norm, merge_params
from gift_jax.training import sharding

LATENTS = ("frozen", "current")
TIMESTEPS = ("interval", "row")


@dataclasses.dataclass(frozen=True)
class Esd:
    """The fields of ESD; the defaults are the paper's, but for `latents`.

    Which parameters train is the run's `trainable`: cross_attention for ESD-x,
    cross_attention_kv for its strict form, non_cross_attention for ESD-u.
    """

    eta: float = config.number(
        1.0, low=0, doc="how far past the unconditional prediction"
    )
    latents: str = config.choice(
        "frozen", LATENTS, "whose trajectory z_t lies on: the original's, or its own"
    )
    steps: int = config.number(50, low=1, doc="S, rows of the sampler's table")
    guidance: float = config.number(3.0, low=1, doc="of the trajectory")
    timestep: str = config.choice(
        "interval", TIMESTEPS, "drawn in the row's interval, or the row's own"
    )
    trajectories: int = config.number(
        32, low=1, doc="latents=frozen: walked once, over all prompts"
    )


def trajectories(
    model: Any,
    cond_N: Any,
    empty_1: Any,
    key: jax.Array,
    s: Esd,
    batch: int = 8,
) -> dict[str, np.ndarray]:
    """Returns what the guided DDIM sampler of a model passes through, on the host.

    Args: model: whose own parameters are used. cond_N: a `pipeline.DeduplicatedArray`,
      the conditioning that trajectory n is guided towards. empty_1: the conditioning
      of "", a pytree "1 ...". key: trajectory n draws its noise by n alone. batch: so
      many are walked at once, divided over this process's devices.
    Returns: z: float32 "N S C H W", scaled latents before each row of the table, the
      first pure noise (3.3 MB a trajectory of 50 rows at 512 pixels). t: float32 "S",
      the rows' timesteps, descending. end: float32 "N C H W", after the last row.
    Raises: UserError if the model's scheduler has no table of that many steps.
    Source: Song et al. 2021, arXiv:2010.02502; Gandikota et al. 2023, section 4.1.
    """
    table = _table(model.scheduler_config, s)
    count = len(cond_N)
    mesh, size = sampler.divide(min(batch, count))
    model = model.with_kernels(model.kernels.for_sampling(mesh))
    ddim_step = _ddim_step(model.denoiser, s)
    params, empty_1 = sharding.replicate(mesh, (model.denoiser_params, empty_1))

    @jax.jit
    def walk(params, z_BCHW, cond, empty_1):
        both = with_empty(cond, empty_1)

        def body(x, row):
            return ddim_step(params, x, row, both), x

        return jax.lax.scan(body, z_BCHW, jax.tree.map(jnp.asarray, table))

    z_NSCHW = np.empty((count, len(table.t), *model.latent_shape), np.float32)
    end_NCHW = np.empty((count, *model.latent_shape), np.float32)
    for some in sampler.in_batches(count, size):
        noise = sampler.numbered_latents(key, some, model.latent_shape)
        noise, cond = sharding.put_batch(mesh, (noise, cond_N[some]))
        end, before_SBCHW = walk(params, noise, cond, empty_1)
        z_NSCHW[some] = np.moveaxis(np.asarray(before_SBCHW), 0, 1)
        end_NCHW[some] = end
    return {"z": z_NSCHW, "t": table.t, "end": end_NCHW}


def rows(z_NSCHW: np.ndarray) -> dict[str, np.ndarray]:
    """Returns every row of every trajectory as an example, the trajectories in turn.

    Args: z_NSCHW: see `trajectories`.
    Returns: z: "N*S C H W", a view. row: int32 "N*S", each one's row of the table.
      trajectory: int32 "N*S", n, which says whose conditioning it goes with.
    """
    count, steps = z_NSCHW.shape[:2]
    return {
        "z": z_NSCHW.reshape(count * steps, *z_NSCHW.shape[2:]),
        "row": np.tile(np.arange(steps, dtype=np.int32), count),
        "trajectory": np.repeat(np.arange(count, dtype=np.int32), steps),
    }


def _table(scheduler_config: Mapping, s: Esd):
    name = schedules.first_order(scheduler_config)  # DDIM, or Euler's of flow matching
    table = schedules.schedule(scheduler_config, name, s.steps)
    return jax.tree.map(np.float32, table)


def make_walk(denoiser: Denoiser, s: Esd, scheduler_config: Mapping) -> Callable:
    """Returns a guided DDIM sampler that stops each example at a row of its own.

    Returns: (network parameters, z "B C H W", row int "B", cond "B ...", empty "1 ...")
      -> the latents before that row, float32 "B C H W". Pure; it takes as many steps as
      the last of the rows asks for, at most S - 1, and has no reverse-mode gradient.
    """
    table = _table(scheduler_config, s)
    table = jax.tree.map(jnp.asarray, table)
    ddim_step = _ddim_step(denoiser, s)

    def walk(network, z_BCHW, row_B, cond, empty_1):
        both = with_empty(cond, empty_1)

        def body(i, x):
            new = ddim_step(network, x, jax.tree.map(lambda a: a[i], table), both)
            return jnp.where(per_example(i < row_B, x), new, x)

        return jax.lax.fori_loop(0, jnp.max(row_B), body, z_BCHW)

    return walk


def _ddim_step(denoiser: Denoiser, s: Esd) -> Callable:
    """Returns (network, x "B C H W", row of the table, "2B ..." of `with_empty`) -> x.

    Latents in float32, guided; without guidance the second half of cond alone is used.
    """

    def ddim_step(network, x, row, both):
        if s.guidance > 1:
            none, some = _predict_twice(denoiser, network, x, row.t, both)
            m = none + s.guidance * (some - none)
        else:
            cond = jax.tree.map(lambda a: a[x.shape[0] :], both)
            m = _predict(denoiser, network, x, row.t, cond)
        return schedules.advance(row, schedules.start(x), m)[0]  # it remembers nothing

    return ddim_step


def _predict(denoiser, network, z_BCHW, t, cond):
    t_B = jnp.broadcast_to(t, (z_BCHW.shape[0],))
    out, _ = denoiser.predict(network, z_BCHW, t_B, cond, ())
    return at_least_float32(out)


def _predict_twice(denoiser, network, z_BCHW, t, cond):
    """Returns the outputs for the first and for the second half of cond."""
    t_B = jnp.broadcast_to(t, (z_BCHW.shape[0],))
    both = jnp.concatenate([z_BCHW, z_BCHW]), jnp.concatenate([t_B, t_B])
    return jnp.split(_predict(denoiser, network, *both, cond), 2)


def with_empty(cond: Any, empty_1: Any) -> Any:
    """Returns the conditioning of "" for every example, then `cond`: "2B ...".

    What images have beside their prompt is each one's own in both.
    """

    def join(empty, own):
        return jnp.concatenate([jnp.broadcast_to(empty, own.shape), own])

    return jax.tree.map(join, {**cond, **empty_1}, cond)


def make_target(denoiser: Denoiser, s: Esd) -> Callable:
    """Returns (frozen, batch) -> the eps to regress onto, float32 "B C H W".

    frozen, batch: see `make_loss`.
    Source: Gandikota et al. 2023, eq. 7, and the code it comes with.
    """

    def target(frozen, batch):
        z_t, t, cond = batch["z"], batch["t"], batch["cond"]
        original = merge_params(frozen["original"], frozen["network"])
        both = with_empty(cond, frozen["empty"])
        outs = _predict_twice(denoiser, original, z_t, t, both)
        none, some = (denoiser.noise.noise_of(out, z_t, t) for out in outs)
        return none - s.eta * (some - none)

    return target


def make_loss(denoiser: Denoiser, s: Esd) -> Callable:
    """Returns (params, frozen, batch) -> (mean square error in eps, metrics).

    params: trainable flat parameters. frozen: network: the other flat parameters;
    original: the original's values of the trainable ones; empty: the conditioning of
    "", "1 ...". batch: z: float32 "B C H W", z_t itself; t: "B"; cond: "B ...",
    each example's own concept.
    """
    target = make_target(denoiser, s)

    def loss(params, frozen, batch):
        z_t, t = batch["z"], batch["t"]
        expected = jax.lax.stop_gradient(target(frozen, batch))
        network = merge_params(params, frozen["network"])
        out = _predict(denoiser, network, z_t, t, batch["cond"])
        eps = denoiser.noise.noise_of(out, z_t, t)
        value = jnp.mean(squared_error(eps, expected))
        return value, {"esd/loss": value}

    return loss


def timesteps_of_rows(
    noise: NoiseProcess, key: jax.Array, row_B: jax.Array, s: Esd, t_S: Any
) -> jax.Array:
    """Returns each example's timestep at its row of the table, "B".

    interval: see `NoiseProcess.sample_t_of_rows`; row: the table's own, t_S.
    """
    if s.timestep == "row":
        return jnp.asarray(t_S)[row_B]
    return noise.sample_t_of_rows(key, row_B, t_S)


def make_step(
    denoiser: Denoiser,
    s: Esd,
    tx: optax.GradientTransformation,
    scheduler_config: Mapping,
    latent_shape: tuple[int, int, int] | None = None,
) -> Step:
    """Returns ESD's step.

    state.params: trainable flat parameters; state.opt: {"upper": tx's}. frozen: see
    `make_loss`. batch: {"harmful": {"cond": "B ..."}}, and for latents=frozen z
    and row of `rows`. The key depends on the base key and state.step only; every
    example draws by its place in the batch. Metrics: esd/loss, esd/grad_norm.

    Args: scheduler_config: the model's; gives the DDIM table. latent_shape: (C, H, W),
      needed by latents=current alone.
    Raises: UserError for a bad number of steps; ValueError for no latent_shape where it
      is needed.
    """
    if s.latents == "current" and latent_shape is None:
        raise ValueError("latents='current' needs latent_shape")
    table = _table(scheduler_config, s)
    walk = make_walk(denoiser, s, scheduler_config)
    grad_fn = jax.value_and_grad(make_loss(denoiser, s), has_aux=True)

    def examples(params, frozen, pairs, key):
        k_noise, k_row, k_t = jax.random.split(key, 3)
        cond = pairs["cond"]
        count = jax.tree.leaves(cond)[0].shape[0]
        if s.latents == "frozen":
            z, row = pairs["z"], pairs["row"]
        else:
            row = timesteps(k_row, count, s.steps)
            noise = sampler.initial_latents(k_noise, count, latent_shape)
            network = merge_params(params, frozen["network"])
            z = walk(network, noise, row, cond, frozen["empty"])
        t = timesteps_of_rows(denoiser.noise, k_t, row, s, table.t)
        return {"z": z, "t": t, "cond": cond}

    def esd_step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        batch = examples(state.params, frozen, batch["harmful"], key)
        (_, metrics), grads = grad_fn(state.params, frozen, batch)
        params, opt = apply_gradients(tx, grads, state.params, state.opt["upper"])
        metrics = metrics | {"esd/grad_norm": global_norm(grads)}
        state = state.replace(step=state.step + 1, params=params, opt={"upper": opt})
        return state, metrics

    return esd_step


def plan(task: base.Task) -> base.Plan:
    """Returns the plan of ESD on the prompts of the harmful pairs."""
    s, model = task.settings, task.model
    if task.run.hardware.grad_accum_steps > 1:
        raise UserError(
            f"config.hardware.grad_accum_steps={task.run.hardware.grad_accum_steps} is "
            "not for method=esd; set --config.hardware.grad_accum_steps=1"
        )
    parts = model.split(task.run.trainable)
    params = jax.tree.map(jnp.array, parts.trainable)  # the loop donates these
    tx = task.optimizer("upper")
    empty = model.encode_text([""])
    cond = task.sources["harmful"].arrays["cond"]
    source = {"cond": cond}
    if s.latents == "frozen":
        source = walked_source(model, cond, empty, task.key("trajectories"), s)
    return base.Plan(
        step=make_step(
            model.denoiser, s, tx, model.scheduler_config, model.latent_shape
        ),
        params=params,
        frozen={"network": parts.frozen, "original": parts.trainable, "empty": empty},
        opt={"upper": tx.init(params)},
        sizes={"harmful": task.batch_size("harmful")},
        exported=tuple(params),
        sources={"harmful": pipeline.ArraySource(source)},
    )


def walked_source(model, cond, empty, key, s: Esd) -> dict[str, Any]:
    """Returns every row of trajectories towards each distinct prompt, see `rows`."""
    prompts = np.unique(cond.rows)
    count = max(s.trajectories, len(prompts))
    targets = pipeline.DeduplicatedArray(cond.table, np.resize(prompts, count))
    logging.info("walking %d trajectories of %d steps", count, s.steps)
    source = rows(trajectories(model, targets, empty, key, s)["z"])
    of_row = targets.rows[source.pop("trajectory")]
    return source | {"cond": pipeline.DeduplicatedArray(cond.table, of_row)}


DEFENSE = base.Defense(
    config=Esd,
    title="ESD (arXiv:2303.07345)",
    plan=plan,
    groups=("harmful",),
    optimizers=("upper",),
    draws_first=True,
    worst_case="100% after DreamBooth by the concept's name, as without a defense",
)
