# SPDX-License-Identifier: Apache-2.0
"""The one training loop: every job that takes steps runs through `run`.

The loop owns all effects: compilation, checkpoints, metrics, progress and signals.
A job hands it a pure step `(state, frozen, batch, key) -> (state, metrics)`.
"""

import contextlib
import dataclasses
import pathlib
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from gift_jax.runtime import malloc, processes, progress, signals
from gift_jax.runtime.errors import NonFiniteError
from gift_jax.state import State, Step
from gift_jax.training import checkpoint, metrics_log, sharding


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run is paced. All counts are steps.

    Attributes:
      steps: total; log_every: metrics; checkpoint_every: 0 saves only at the end.
      keep: checkpoints kept. name: word shown in the progress line. on_nan: of
      `ON_NAN`; what follows a `NonFiniteError`: it ends the run, or the run goes back
      to its newest checkpoint with half the learning rate, `nan_retries` times at most.
    """

    steps: int
    log_every: int = 20
    checkpoint_every: int = 100
    keep: int = 2
    name: str = "train"
    on_nan: str = "stop"
    nan_retries: int = 3


ON_NAN = ("stop", "restore")
_COMPILED_S = 5.0  # a first step that takes longer was compiled in this process


@dataclasses.dataclass(frozen=True)
class Callback:
    """Something to do at chosen steps, such as drawing samples.

    Attributes: at: counts of steps done; 0 is before the first. call: gets one of them
      and the state, which it must have read when it returns: the next step reuses its
      memory. A resumed run makes the calls of the steps that it takes; those of a step
      that was lost are made twice.
    """

    at: Collection[int]
    call: Callable[[int, State], None]


class Batches:
    """Several named batch iterators advanced together, saved and restored together."""

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


def compile_step(step_fn: Step, placed: tuple | None = None) -> Step:
    """Jits a step and donates the state it replaces (never frozen).

    A step that is compiled already is returned: several runs may share it.

    Args: placed: (state, frozen, batch, key) on their devices: what goes in lies there,
      and the new state where the old one lay. None: as XLA finds it.
    """
    if hasattr(step_fn, "lower"):
        return step_fn
    if placed is None:
        return jax.jit(step_fn, donate_argnums=0)
    where = jax.tree.map(lambda a: a.sharding, placed)
    out = where[0], where[3]  # metrics, as the key, whole on every device
    return jax.jit(step_fn, donate_argnums=0, in_shardings=where, out_shardings=out)


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
    calls: Sequence[Callback] = (),
) -> State:
    """Takes steps until options.steps, resuming from workdir's newest checkpoint.

    Args: state: at step 0; frozen: arrays the step reads, never donated; key: the
      run's base key, which the step folds with state.step. place: puts a batch of
      NumPy arrays on the devices. calls: made after the metrics of a step are known
      to be finite and before its checkpoint.
    Returns: the final state, which is also the newest checkpoint.
    Raises: StoppedBySignal after SIGINT or SIGTERM, once a checkpoint is written;
      NonFiniteError if a metric or a parameter is NaN or infinite and stays so.
    """
    store = checkpoint.Checkpoints(
        workdir / "checkpoints",
        keep=options.keep,
        every=options.checkpoint_every,
    )
    with contextlib.closing(store), signals.collected() as received:
        run = _Run(step_fn, frozen, batches, key, options, workdir, place, calls, store)
        target = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
        )
        if store.latest_step() is not None:
            state = run.restored(target)
        elif options.on_nan == "restore":
            run.save(0, state)  # to come back to
        while True:
            scale = rate_scale(state)
            try:
                state = run.take_steps(state, received)
                break
            except NonFiniteError as error:
                scale = scale / 2
                if options.on_nan != "restore" or scale < 2.0**-options.nan_retries:
                    raise
                state = with_rate_scale(run.restored(target), scale)
                logging.warning(
                    "%s Going on from step %d with %g of the learning rate",
                    error,
                    int(state.step),
                    scale,
                )
        if received:
            raise signals.StoppedBySignal(received[0])
    return state


@dataclasses.dataclass
class _Run:
    """The parts of a run, to take its steps with, perhaps again from a checkpoint."""

    step_fn: Step
    frozen: Any
    batches: Batches
    key: jax.Array
    options: Options
    workdir: pathlib.Path
    place: Callable[[Any], Any]
    calls: Sequence[Callback]
    store: checkpoint.Checkpoints
    compiled: Step | None = None

    def restored(self, target: State) -> State:
        """Returns the newest good checkpoint's state; batches and key follow it."""
        state, position = self.store.restore(target)
        self.batches.set_state(position["batches"])
        saved = jnp.asarray(position["key"], jnp.uint32)
        self.key = sharding.put(jax.random.wrap_key_data(saved), self.key.sharding)
        return state

    def save(self, done: int, state: State) -> None:
        told = processes.to_host(jax.jit(jax.random.key_data)(self.key))
        position = {"key": told.tolist(), "batches": self.batches.get_state()}
        self.store.save(done, state, position)

    def take_steps(self, state: State, received: list[int]) -> State:
        """Takes the steps that are left, fewer if a signal is received."""
        options, store = self.options, self.store
        start = int(state.step)
        with (
            metrics_log.MetricsLog(self.workdir, start, store.latest_step) as log,
            progress.bar(options.name, options.steps, start) as bar,
        ):
            if start == 0:
                _run_callbacks(self.calls, 0, state, log)
            clock = time.perf_counter()
            for step in range(start, options.steps):
                batch = self.place(next(self.batches))
                if self.compiled is None:
                    placed = state, self.frozen, batch, self.key
                    self.compiled = compile_step(self.step_fn, placed)
                state, metrics = self.compiled(state, self.frozen, batch, self.key)
                log.watch(state.step, metrics)
                done = step + 1
                if step == start:
                    jax.block_until_ready(state.step)
                    signals.be_patient(True)
                    seconds = time.perf_counter() - clock
                    if seconds > _COMPILED_S:
                        malloc.close_gaps()
                    logging.info("%s: first step took %.1f s", options.name, seconds)
                last = done == options.steps
                if processes.preempted(done):
                    received.append(signal.SIGTERM)
                stop = bool(received)
                due = last or store.due(done)
                saves, logs = due or stop, due or done % options.log_every == 0
                called = any(done in call.at for call in self.calls)
                if saves or logs or called:
                    params = state.params if saves else None
                    values = log.check(done, metrics, params)
                if logs:  # no line that a run without signals or calls would not have
                    log.write(done, values, _batch_size(batch))
                _run_callbacks(self.calls, done, state, log)
                bar.update(done, log.latest)
                if saves:
                    self.save(done, state)
                if stop:
                    break
        return state


def scaled(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the same with a factor of all its updates, 1, in its state."""
    return optax.chain(tx, optax.inject_hyperparams(optax.scale)(step_size=1.0))


def rate_scale(state: State) -> float:
    """Returns the factor that `scaled` optimizers have in a state; 1 if there is none.

    Its levels' factors are the same.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state.opt)
    return next((float(a) for keys, a in leaves if _is_scale(keys)), 1.0)


def with_rate_scale(state: State, scale: float) -> State:
    """Returns the state with that factor in place of the one it has."""

    def change(keys, a):
        return sharding.put(np.full_like(a, scale), a.sharding)

    opt = jax.tree_util.tree_map_with_path(
        lambda keys, a: change(keys, a) if _is_scale(keys) else a, state.opt
    )
    return state.replace(opt=opt)


def _is_scale(keys) -> bool:
    return getattr(keys[-1], "key", None) == "step_size"


def _run_callbacks(calls: Sequence[Callback], done: int, state: State, log) -> None:
    for call in calls:
        if done in call.at:
            began = time.perf_counter()
            call.call(done, state)
            log.leave_out(time.perf_counter() - began)


def _batch_size(batch: Any) -> int:
    leaves = jax.tree.leaves(batch)
    return int(leaves[0].shape[0]) if leaves else 0
