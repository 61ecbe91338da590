# SPDX-License-Identifier: Apache-2.0
"""The training step that all stages share: one update, and averaged weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from gift_jax.data import augment
from gift_jax.state import Loss, Step, make_update


def make_step(
    name: str,
    loss_fn: Loss,
    tx: optax.GradientTransformation,
    decay: Callable[[jax.Array], jax.Array | float],
) -> Step:
    """Returns a step down a loss on batch["train"]; logs it as `name/loss`.

    Args: decay: the step's number -> of the average of the weights.
    """

    def logged_loss(*args):
        loss, metrics = loss_fn(*args)
        return loss, {f"{name}/loss": loss, **metrics}

    update = make_update(name, logged_loss, tx)

    def step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        args = state.params, state.opt[name], frozen, batch["train"], key
        params, opt, metrics = update(*args)
        share = 1.0 - decay(state.step)
        ema = optax.incremental_update(params, state.ema, share)
        step = state.step + 1
        return state.replace(
            step=step, params=params, opt={name: opt}, ema=ema
        ), metrics

    return step


def augmented(key, batch, cfg):
    """Returns a batch's images as float32 "B 64 64 3" in [-1, 1], augmented."""
    return augment.augment(
        key,
        batch["image"].astype(jnp.float32) / 127.5 - 1.0,
        batch["may_flip"],
        flip=cfg.flip,
        shift=cfg.shift,
        scale=cfg.scale,
    )
