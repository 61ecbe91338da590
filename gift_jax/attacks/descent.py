# SPDX-License-Identifier: Apache-2.0
"""The step that every attack takes: one update of one optimizer down one loss."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from gift_jax.state import Step, accumulate_gradients, global_norm

# (trained parameters, frozen, batch, key) -> (scalar loss, further scalars to log)
Loss = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def make_step(loss_fn: Loss, tx: optax.GradientTransformation, parts: int = 1) -> Step:
    """Returns the step: state.params go down `loss_fn`; state.opt is {"attack"}.

    Logs attack/loss, attack/grad_norm (before clipping) and what `loss_fn` adds.
    parts: see `losses.in_parts`.
    """

    def with_loss(*args):
        loss, others = loss_fn(*args)
        return loss, {"attack/loss": loss, **others}

    grad_fn = accumulate_gradients(jax.grad(with_loss, has_aux=True), parts)

    def attack_step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        grads, metrics = grad_fn(state.params, frozen, batch, key)
        updates, opt = tx.update(grads, state.opt["attack"], state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {"attack/grad_norm": global_norm(grads)}
        state = state.replace(step=state.step + 1, params=params, opt={"attack": opt})
        return state, metrics

    return attack_step
