# SPDX-License-Identifier: Apache-2.0
"""The contract of a training step, and what every step is made of.

A step maps `(state, frozen, batch, key)` to `(state, metrics)`: pure, without I/O.
What changes lives in `State`; `frozen` never changes; `key` is the run's base key,
which the step folds with state.step.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict

Metrics = dict[str, jax.Array]


class State(flax.struct.PyTreeNode):
    """What changes during a run.

    Attributes:
      step: int32 scalar, steps done.
      params: the trained parameters, flat dict of path -> float32 array.
      opt: one optax state for each level or optimizer name.
      ema: exponential moving average of params, or an empty dict.
    """

    step: jax.Array
    params: dict[str, jax.Array]
    opt: dict[str, Any]
    ema: dict[str, jax.Array] = flax.struct.field(default_factory=dict)


Step = Callable[[State, Any, Any, jax.Array], tuple[State, Metrics]]

# (trained parameters, frozen, batch, key) -> (scalar to minimize, further metrics)
Loss = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Metrics]]

# (parameters, optimizer's state, frozen, batch, key) -> (parameters, state, metrics)
Update = Callable[[Any, Any, Any, Any, jax.Array], tuple[Any, Any, Metrics]]


def init_state(params: Mapping[str, jax.Array], opt: dict[str, Any], *, ema=False):
    """Returns a State at step 0; with ema=True the average starts at the parameters.

    Without weak types, such as those of `jnp.full(3, 1.0)`: the first steps would lose
    them, and each loss is another compilation of the step.
    """

    def strong(a):
        is_weak = isinstance(a, jax.Array) and a.weak_type
        return jax.lax.convert_element_type(a, a.dtype) if is_weak else a

    strong_params, opt = jax.tree.map(strong, (dict(params), opt))
    average = jax.tree.map(jnp.array, strong_params) if ema else {}
    return State(jnp.zeros((), jnp.int32), strong_params, opt, average)


def merge_params(trainable: Mapping, frozen: Mapping) -> dict[str, Any]:
    """Returns the nested parameters of two flat dicts with no path in common."""
    both = sorted(set(trainable) & set(frozen))
    if both:
        raise ValueError(f"{both[0]} is both trainable and frozen")
    return unflatten_dict({**frozen, **trainable}, sep="/")


def run_key(seed: int, purpose: str) -> jax.Array:
    """Returns the key of one purpose of a run, such as "attack/steps".

    What two purposes draw is independent, also where a defense and an attack on it have
    the same seed.
    """
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


# --- one update -----------------------------------------------------------------------


def make_update(
    name: str,
    loss: Loss,
    tx: optax.GradientTransformation,
    micro_batches: int = 1,
) -> Update:
    """Returns one update of one optimizer down one loss.

    Differentiable, so that a gradient can be taken through it.

    Args: name: prefix of the metric `name/grad_norm`, before clipping. micro_batches:
      see `accumulate_gradients`.
    """
    grad_fn = accumulate_gradients(gradient(loss), micro_batches)

    def update(params, opt, frozen, batch, key):
        grads, metrics = grad_fn(params, frozen, batch, key)
        params, opt = apply_gradients(tx, grads, params, opt)
        return params, opt, metrics | {f"{name}/grad_norm": global_norm(grads)}

    return update


def apply_gradients(tx: optax.GradientTransformation, grads, params, opt):
    """Returns (parameters, optimizer's state) after one update by these gradients."""
    updates, opt = tx.update(grads, opt, params)
    return optax.apply_updates(params, updates), opt


def repeat_update(update: Update, steps: int) -> Update:
    """Returns `steps` updates in one scan, each on its part of the batch.

    The batch's leading axis is steps * B, see `split_batch`; metrics are those of the
    last update. With 0 steps nothing changes and no metric is reported.
    """

    def updates(params, opt, frozen, batch, key):
        if steps == 0:
            return params, opt, {}

        def body(carry, part):
            params, opt = carry
            batch, key = part
            params, opt, metrics = update(params, opt, frozen, batch, key)
            return (params, opt), metrics

        parts = split_batch(batch, steps)
        # One update uses the key itself, as the unrolled and the joint gradient do.
        keys = jax.random.split(key, steps) if steps > 1 else key[None]
        if steps == 1:  # no loop: faster on CPU, and easier to read in a profile
            first = jax.tree.map(lambda a: a[0], (parts, keys))
            (params, opt), metrics = body((params, opt), first)
            return params, opt, metrics
        carry, metrics = jax.lax.scan(
            jax.checkpoint(body), (params, opt), (parts, keys)
        )
        return *carry, jax.tree.map(lambda m: m[-1], metrics)

    return updates


def make_descent(
    name: str,
    loss: Loss,
    tx: optax.GradientTransformation,
    micro_batches: int = 1,
) -> Step:
    """Returns the step of one update of one optimizer; state.opt is {name: ...}."""
    update = make_update(name, loss, tx, micro_batches)

    def step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        args = state.params, state.opt[name], frozen, batch, key
        params, opt, metrics = update(*args)
        state = state.replace(step=state.step + 1, params=params, opt={name: opt})
        return state, metrics

    return step


def gradient(loss: Loss) -> Callable:
    """Returns `jax.grad(loss, has_aux=True)`, cheaper to differentiate in its turn.

    Its derivative is the loss's Hessian times a vector, taken forward over reverse: the
    memory of about two gradients, where reverse over reverse takes more. Metrics count
    as constants.
    """
    plain = jax.grad(loss, has_aux=True)

    def forward(*args):
        return plain(*args), args

    def backward(args, cotangents):
        params, *rest = args
        (vector, _) = cotangents
        _, product = jax.jvp(lambda p: plain(p, *rest)[0], (params,), (vector,))
        return product, None, None, None

    grad_fn = jax.custom_vjp(plain)
    grad_fn.defvjp(forward, backward)
    return grad_fn


# --- micro-batches --------------------------------------------------------------------


def split_batch(batch, parts: int):
    """Returns a batch "B ..." as parts "P B/P ...", each of every P-th example.

    So all devices that a batch is divided over share in every part: of P neighbors
    each, a part would lie on some of them, and all would compute the whole of it.

    Args: parts: P, must divide the batch.
    """
    return jax.tree.map(
        lambda a: jnp.swapaxes(a.reshape(-1, parts, *a.shape[1:]), 0, 1), batch
    )


def accumulate_gradients(grad_fn: Callable, micro_batches: int) -> Callable:
    """Returns (params, frozen, batch, key) -> (gradient, metrics), a part at a time.

    The memory of one part's gradient; of losses that are means over examples the same
    gradient, with the same noise.

    Args: grad_fn: the same of a whole batch. micro_batches: how many parts, see
      `split_batch`; the batch's examples need their `index` in it.
    """
    if micro_batches == 1:
        return grad_fn

    def accumulated(params, frozen, batch, key):
        def add(total, part):
            grads, metrics = grad_fn(params, frozen, part, key)
            return jax.tree.map(jnp.add, total, grads), metrics

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, metrics = jax.lax.scan(add, zeros, split_batch(batch, micro_batches))
        grads = jax.tree.map(lambda g: g / micro_batches, total)
        return grads, jax.tree.map(jnp.mean, metrics)

    return accumulated


def global_norm(tree) -> jax.Array:
    """Returns the Euclidean norm over all leaves of a pytree, a scalar."""
    squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros(())))
