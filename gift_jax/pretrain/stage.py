# SPDX-License-Identifier: Apache-2.0
"""One stage of pretraining: its optimizer and its run, resumed where it was stopped."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gift_jax.data import pipeline
from gift_jax.pretrain.step import make_step
from gift_jax.state import Loss, init_state
from gift_jax.training import loop, sharding


def train(
    cfg: Any,
    workdir: pathlib.Path,
    mesh: Mesh,
    name: str,
    params: Any,
    loss_fn: Loss,
    source: Any,
    *,
    number: int = 0,
    frozen: Any = None,
    decay: Callable[[jax.Array], jax.Array | float] | None = None,
) -> Any:
    """Trains one stage in workdir/name; returns its averaged parameters on the host.

    Args: cfg: the config, which has a group of the stage's name. source: of `pipeline`.
      number: of the stage, by which its noise differs from that of others. decay: of
      the average, see `make_step`; by default the stage's `ema`.
    """
    stage = cfg[name]
    tx = _optimizer(stage)
    state = init_state(params, {name: tx.init(params)}, ema=True)
    batches = pipeline.batches(source, stage.batch, cfg.seed)
    key = jax.random.fold_in(jax.random.key(cfg.seed), number)
    state = loop.run(
        sharding.replicate(mesh, state),
        make_step(name, loss_fn, tx, decay or (lambda step: stage.ema)),
        sharding.replicate(mesh, frozen or {}),
        loop.Batches({"train": batches}),
        sharding.replicate(mesh, key),
        options=loop.Options(
            steps=stage.steps,
            log_every=cfg.log_every,
            checkpoint_every=cfg.checkpoint_every,
            name=name,
        ),
        workdir=workdir / name,
        place=lambda batch: sharding.put_batch(mesh, batch),
    )
    return jax.device_get(state.ema)


def growing_decay(ema: float) -> Callable[[jax.Array], jax.Array]:
    """Returns a decay for `make_step` that grows to `ema`.

    An average over few steps is of random weights.
    """
    return lambda step: jnp.minimum(ema, (1.0 + step) / (10.0 + step))


def _optimizer(stage) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, stage.lr, max(1, stage.steps // 20), stage.steps, stage.lr / 50
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.99, weight_decay=stage.weight_decay),
    )
