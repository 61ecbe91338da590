# SPDX-License-Identifier: Apache-2.0
"""The contract of a training step: State, Step, micro-batches and keys."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class State:
    """What changes during a run.

    Attributes:
      step: int32 scalar, steps done.
      params: the trained parameters, flat dict of path -> float32 array.
      opt: one optax state for each level or optimiser name.
      ema: exponential moving average of params, or an empty dict.
    """

    step: jax.Array
    params: dict[str, jax.Array]
    opt: dict[str, Any]
    ema: dict[str, jax.Array] = flax.struct.field(default_factory=dict)


Step = Callable[[State, Any, Any, jax.Array], tuple[State, Metrics]]


def init_state(params: Mapping[str, jax.Array], opt: dict[str, Any], *, ema=False):
    """A State at step 0; with ema=True the average starts at the parameters."""
    params = dict(params)
    average = jax.tree.map(jnp.array, params) if ema else {}
    return State(jnp.zeros((), jnp.int32), params, opt, average)


def run_key(cfg: Any, purpose: str) -> jax.Array:
    """Returns the key of one purpose of a run, such as "attack/steps".

    What two purposes draw is independent, also where a defence and an attack on it have
    the same seed.
    """
    return jax.random.fold_in(jax.random.key(cfg.seed), zlib.crc32(purpose.encode()))


def split_batch(batch, parts: int):
    """Returns a batch "B ..." as parts "P B/P ...", each of every P-th example.

    So all devices that a batch is divided over share in every part: of P neighbours
    each, a part would lie on some of them, and all would compute the whole of it.

    Args: parts: P, must divide the batch.
    """
    return jax.tree.map(
        lambda a: jnp.swapaxes(a.reshape(-1, parts, *a.shape[1:]), 0, 1), batch
    )


def accumulate_gradients(grad_fn: Callable, parts: int) -> Callable:
    """Returns (params, frozen, batch, key) -> (gradient, metrics), a part at a time.

    The memory of one part's gradient; of losses that are means over examples the same
    gradient, with the same noise.

    Args: grad_fn: the same of a whole batch. parts: see `split`; the batch's examples
      need their `index` in it.
    """
    if parts == 1:
        return grad_fn

    def grads_in_parts(params, frozen, batch, key):
        def add(total, part):
            grads, metrics = grad_fn(params, frozen, part, key)
            return jax.tree.map(jnp.add, total, grads), metrics

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, metrics = jax.lax.scan(add, zeros, split_batch(batch, parts))
        grads = jax.tree.map(lambda g: g / parts, total)
        return grads, jax.tree.map(jnp.mean, metrics)

    return grads_in_parts


def global_norm(tree) -> jax.Array:
    """Returns the Euclidean norm over all leaves of a pytree, a scalar."""
    squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros(())))
