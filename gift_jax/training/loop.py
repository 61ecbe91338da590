# SPDX-License-Identifier: Apache-2.0
"""The training loop of every command that takes steps.

The loop owns all effects: compilation, checkpoints, metrics, progress and signals.
A command gives it a pure step `(state, frozen, batch, key) -> (state, metrics)`.
"""

import contextlib
import dataclasses
import pathlib
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from absl import logging

from gift_jax.runtime import processes, progress, signals
from gift_jax.state import State, Step
from gift_jax.training import metrics_log, sharding

if TYPE_CHECKING:
    from gift_jax.training.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class Options:
    """The length of a run and the pace of its output, in steps.

    Attributes:
      steps: in the whole run.
      log_every: steps between two lines of metrics.
      checkpoint_every: steps between two checkpoints; 0: only at the end.
      checkpoint_last: also at the end; False for a run whose state nobody needs then.
      keep: how many checkpoints to keep.
      name: of the run, in progress lines.
    """

    steps: int
    log_every: int = 20
    checkpoint_every: int = 100
    checkpoint_last: bool = True
    keep: int = 2
    name: str = "train"


@dataclasses.dataclass(frozen=True)
class Callback:
    """Something to do after chosen steps, such as drawing samples.

    Attributes:
      steps: numbers of steps done; 0 is before the first.
      call: gets one of them and the state, of which it must not keep the arrays: the
        next step reuses their memory. A resumed run calls it again for the steps that
        it takes again.
    """

    steps: Collection[int]
    call: Callable[[int, State], None]


class Batches:
    """Several named batch iterators, advanced, saved and restored together."""

    def __init__(self, iterators: Mapping[str, Any]):
        self._iterators = dict(iterators)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        return {name: next(it) for name, it in self._iterators.items()}

    def get_state(self) -> dict[str, Any]:
        return {name: it.get_state() for name, it in self._iterators.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        for name, it in self._iterators.items():
            it.set_state(state[name])


def run(
    state: State,
    step_fn: Step,
    frozen: Any,
    batches: Batches,
    key: jax.Array,
    *,
    options: Options,
    workdir: pathlib.Path,
    place: Callable[[Any], Any] = lambda batch: batch,
    callbacks: Sequence[Callback] = (),
) -> State:
    """Takes steps until options.steps, resuming from workdir's newest checkpoint.

    Args: state: at step 0. frozen: arrays that the step reads, never donated. key: the
      run's base key, which the step folds with state.step. place: puts a batch of NumPy
      arrays on the devices. callbacks: called before the checkpoint of their step, and
      only if its metrics are finite.
    Returns: the final state, which is also the newest checkpoint, if that is saved.
    Raises: StoppedBySignal after SIGINT or SIGTERM, once a checkpoint is written;
      NonFiniteError if a metric or a parameter is NaN or infinite.
    """
    from gift_jax.training import checkpoint  # Orbax, which --help need not wait for

    with contextlib.ExitStack() as stack:
        flag = stack.enter_context(signals.flag.in_loop(jax.process_count() > 1))
        folder, every = workdir / "checkpoints", options.checkpoint_every
        store = checkpoint.Checkpoints(folder, keep=options.keep, every=every)
        stack.enter_context(contextlib.closing(store))
        if store.latest_step() is not None:
            state, key = _restore(store, state, batches, key)
        start = int(state.step)
        log = metrics_log.MetricsLog(workdir, start, store.latest_step)
        stack.enter_context(log)
        if start < options.steps and not hasattr(step_fn, "lower"):
            logging.info("%s: compiles its step", options.name)
        bar = stack.enter_context(progress.bar(options.name, options.steps, start))
        if start == 0:
            _run_callbacks(callbacks, 0, state, log)
        began, waits = time.perf_counter(), _shares_threads(state.step)

        for step in range(start, options.steps):
            batch = place(next(batches))
            step_fn = compile_step(step_fn, (state, frozen, batch, key))
            if waits:
                jax.block_until_ready(state.step)
            state, metrics = step_fn(state, frozen, batch, key)
            log.watch(state.step, metrics)
            if step == start:
                jax.block_until_ready(state.step)
                flag.deferred = True  # from now on there is progress to save
                seconds = time.perf_counter() - began
                logging.info("%s: first step took %.1f s", options.name, seconds)
            done = step + 1
            stop = _stop_requested(flag, done)
            is_last = done == options.steps
            scheduled = store.due(done) or (is_last and options.checkpoint_last)
            log_due = (
                scheduled or is_last or done % options.log_every == 0
            )  # a stop adds no line
            if stop or log_due or any(done in c.steps for c in callbacks):
                params = state.params if stop or scheduled or is_last else None
                values = log.check(done, metrics, params)
            if log_due:
                log.write(done, values, _batch_size(batch))
            _run_callbacks(callbacks, done, state, log)
            bar.update(done, log.latest)
            if stop or scheduled:
                _save(store, done, state, batches, key)
            if stop:
                break  # and `flag` raises, once everything is on disk
    return state


def compile_step(step_fn: Step, args: tuple | None = None) -> Step:
    """Jits a step and donates the state that it replaces (never frozen).

    A step that is compiled already is returned: several runs may share it.

    Args: args: (state, frozen, batch, key) on their devices: the arguments are expected
      there, and the new state replaces the old one there. None: as XLA chooses.
    """
    if hasattr(step_fn, "lower"):
        return step_fn
    if args is None:
        return jax.jit(step_fn, donate_argnums=0)
    shardings = jax.tree.map(lambda a: a.sharding, args)
    out = shardings[0], shardings[3]  # metrics, like the key, whole on every device
    return jax.jit(step_fn, donate_argnums=0, in_shardings=shardings, out_shardings=out)


def _shares_threads(array: jax.Array) -> bool:
    """Whether an array lies on several devices that are one CPU.

    Two steps at once may then wait for each other forever: each sums over the devices
    in a thread that the other needs.
    """
    devices = array.sharding.device_set
    return len(devices) > 1 and all(d.platform == "cpu" for d in devices)


def _stop_requested(flag: signals.SignalFlag, done: int) -> bool:
    """Whether to stop after this step; several processes stop after the same one."""
    if processes.preempted(done):
        flag.signum = flag.signum or signal.SIGTERM
        return True
    return flag.signum is not None and jax.process_count() == 1


def _save(
    store: "Checkpoints",
    done: int,
    state: State,
    batches: Batches,
    key: jax.Array,
) -> None:
    words = processes.to_host(jax.jit(jax.random.key_data)(key))
    store.save(done, state, {"key": words.tolist(), "batches": batches.get_state()})


def _restore(
    store: "Checkpoints", state: State, batches: Batches, key: jax.Array
) -> tuple[State, jax.Array]:
    """Returns (state, key) of the newest intact checkpoint; the batches follow it."""
    target = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )
    state, position = store.restore(target)
    batches.set_state(position["batches"])
    words = jnp.asarray(position["key"], jnp.uint32)
    return state, sharding.put(jax.random.wrap_key_data(words), key.sharding)


def _run_callbacks(
    callbacks: Sequence[Callback], done: int, state: State, log: metrics_log.MetricsLog
) -> None:
    for callback in callbacks:
        if done in callback.steps:
            began = time.perf_counter()
            callback.call(done, state)
            log.leave_out(time.perf_counter() - began)


def _batch_size(batch: Any) -> int:
    leaves = jax.tree.leaves(batch)
    return int(leaves[0].shape[0]) if leaves else 0
