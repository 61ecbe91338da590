# SPDX-License-Identifier: Apache-2.0
"""The one training loop: every job that takes steps runs through `run`.

The loop owns all effects: compilation, checkpoints, metrics, progress and signals.
A job hands it a pure step `(state, frozen, batch, key) -> (state, metrics)`.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from gift_jax import (
    checkpoint,
    files,
    heap,
    hosts,
    progress,
    sharding,
    stopping,
    torchless,
)

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
class Call:
    """Something to do at chosen steps, such as drawing samples.

    Attributes: at: counts of steps done; 0 is before the first. call: gets one of them
      and the state, which it must have read when it returns: the next step reuses its
      memory. A resumed run makes the calls of the steps that it takes; those of a step
      that was lost are made twice.
    """

    at: Collection[int]
    call: Callable[[int, State], None]


class NonFiniteError(RuntimeError):
    """A loss, a gradient's norm or a parameter became NaN or infinite."""


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


def init_state(params: Mapping[str, jax.Array], opt: dict[str, Any], *, ema=False):
    """A State at step 0; with ema=True the average starts at the parameters."""
    params = dict(params)
    average = jax.tree.map(jnp.array, params) if ema else {}
    return State(jnp.zeros((), jnp.int32), params, opt, average)


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
    calls: Sequence[Call] = (),
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
    with contextlib.closing(store), stopping.collected() as received:
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
            raise stopping.StoppedBySignal(received[0])
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
    calls: Sequence[Call]
    store: checkpoint.Checkpoints
    compiled: Step | None = None

    def restored(self, target: State) -> State:
        """Returns the newest good checkpoint's state; batches and key follow it."""
        state, position = self.store.restore(target)
        self.batches.set_state(position["batches"])
        saved = jnp.asarray(position["key"], jnp.uint32)
        self.key = sharding.place(jax.random.wrap_key_data(saved), self.key.sharding)
        return state

    def save(self, done: int, state: State) -> None:
        told = hosts.fetch(jax.jit(jax.random.key_data)(self.key))
        position = {"key": told.tolist(), "batches": self.batches.get_state()}
        self.store.save(done, state, position)

    def take_steps(self, state: State, received: list[int]) -> State:
        """Takes the steps that are left, fewer if a signal is received."""
        options, store = self.options, self.store
        start = int(state.step)
        with (
            MetricsLog(self.workdir, start, store.latest_step) as log,
            progress.bar(options.name, options.steps, start) as bar,
        ):
            if start == 0:
                _make_calls(self.calls, 0, state, log)
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
                    stopping.be_patient(True)
                    seconds = time.perf_counter() - clock
                    if seconds > _COMPILED_S:
                        heap.close_gaps()
                    logging.info("%s: first step took %.1f s", options.name, seconds)
                last = done == options.steps
                if hosts.asked_to_stop(done):
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
                _make_calls(self.calls, done, state, log)
                bar.update(done, log.latest)
                if saves:
                    self.save(done, state)
                if stop:
                    break
        return state


# --- the learning rate's scale --------------------------------------------------------


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
        return sharding.place(np.full_like(a, scale), a.sharding)

    opt = jax.tree_util.tree_map_with_path(
        lambda keys, a: change(keys, a) if _is_scale(keys) else a, state.opt
    )
    return state.replace(opt=opt)


def _is_scale(keys) -> bool:
    return getattr(keys[-1], "key", None) == "step_size"


def _make_calls(calls: Sequence[Call], done: int, state: State, log) -> None:
    for call in calls:
        if done in call.at:
            began = time.perf_counter()
            call.call(done, state)
            log.leave_out(time.perf_counter() - began)


class MetricsLog:
    """Appends one JSON object a logged step to metrics.jsonl, and to TensorBoard.

    Lines of steps after `start` (of a run that was stopped between a logged step
    and its checkpoint) are dropped, so that a resumed run repeats none. Of several
    processes the first one writes; all of them check.

    Args: last_good: returns the newest checkpoint's step, or None, for errors.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        start: int,
        last_good: Callable[[], int | None] = lambda: None,
    ):
        self._path = workdir / "metrics.jsonl"
        self._workdir = workdir
        self._start = start
        self._last_good = last_good
        self._since = (start, time.perf_counter())
        self._watched: list[str] = []
        self._first_bad = None
        self.latest: dict[str, float] = {}

    def __enter__(self) -> "MetricsLog":
        if not hosts.is_first():
            return self
        with torchless.imports():
            import tensorboardX  # imports protobuf: 0.3 s that --help need not pay

        self._file = files.Lines(
            self._path, keep=lambda line: _step_of(line) <= self._start
        )
        self._board = tensorboardX.SummaryWriter(
            str(self._workdir), purge_step=self._start + 1
        )
        return self

    def watch(self, step: jax.Array, metrics: Metrics) -> None:
        """Notes, on the devices, the first step after which a metric is not finite.

        Those called concept/... may be NaN: of a concept that the step had no pair of.
        """
        names = [name for name in metrics if not name.startswith("concept/")]
        self._watched = sorted(names, key=lambda name: ("loss" not in name, name))
        values = tuple(metrics[name] for name in self._watched)
        if self._first_bad is None:
            self._first_bad = np.full(len(names), -1, np.int32)
        self._first_bad = _note(self._first_bad, step, values)

    def check(
        self, step: int, metrics: Metrics, params: Mapping[str, jax.Array] | None = None
    ) -> dict[str, float]:
        """Fetches one step's metrics (the only host copy) and what `watch` has noted.

        Args: params: to be looked through too, all processes calling.
        Raises: NonFiniteError naming the step, the metric and the parameter.
        """
        values, first_bad = jax.device_get((metrics, self._first_bad))
        values = {name: float(v) for name, v in values.items()}
        values = {
            name: value
            for name, value in values.items()
            if not (name.startswith("concept/") and math.isnan(value))
        }
        bad = {} if first_bad is None else dict(enumerate(first_bad.tolist()))
        bad = {self._watched[i]: at for i, at in bad.items() if at >= 0}
        wrong = checkpoint.not_finite(params) if params or bad else []
        if bad:
            name = min(bad, key=lambda name: bad[name])
            raise self._error(bad[name], name, values[name], wrong)
        if wrong:
            raise self._error(step, f"parameter {wrong[0]}", math.nan, [])
        return values

    def _error(self, step: int, name: str, value: float, wrong: list[str]):
        last = self._last_good()
        good = "no checkpoint yet" if last is None else f"last checkpoint: {last}"
        now = value if not math.isfinite(value) else "not finite"
        parameter = f"; so is the parameter {wrong[0]}" if wrong else ""
        return NonFiniteError(
            f"step {step}: {name} is {now}{parameter} ({good}). Lower the learning "
            "rate, bound the ascent, or set --config.on_nan=restore."
        )

    def leave_out(self, seconds: float) -> None:
        """Counts seconds in which no step was taken out of the steps' time."""
        step, then = self._since
        self._since = (step, then + seconds)

    def write(self, step: int, values: dict[str, float], batch_size: int) -> None:
        """Writes one step's metrics, as `check` returns them."""
        (old_step, old_time), now = self._since, time.perf_counter()
        if step > old_step:
            seconds = (now - old_time) / (step - old_step)
            values = values | {
                "time/step_s": round(seconds, 5),
                "time/examples_per_s": round(batch_size / seconds, 2),
            }
        self._since = (step, now)
        self.latest = values
        if not hosts.is_first():
            return
        self._file.add(json.dumps({"step": step, **values}))
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def __exit__(self, *exc) -> None:
        if hosts.is_first():
            self._file.close()
            self._board.close()


@jax.jit
def _note(first_M, step, values):
    """Returns int32 "M": the first step after which each value was bad, or -1."""
    bad_M = ~jnp.stack([jnp.all(jnp.isfinite(value)) for value in values])
    return jnp.where(bad_M & (first_M < 0), step, first_M)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the last line of a process that was killed as it wrote
        return math.inf


def _batch_size(batch: Any) -> int:
    leaves = jax.tree.leaves(batch)
    return int(leaves[0].shape[0]) if leaves else 0
