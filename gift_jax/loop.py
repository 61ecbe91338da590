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
from absl import logging

from gift_jax import checkpoint, hosts, progress, sharding

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
      keep: checkpoints kept. name: word shown in the progress line.
    """

    steps: int
    log_every: int = 20
    checkpoint_every: int = 100
    keep: int = 2
    name: str = "train"


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


class StoppedBySignal(Exception):  # noqa: N818 - an event, not an error
    """The run was asked to stop and has saved a checkpoint."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by signal {signum} after a checkpoint")
        self.exit_code = 128 + signum


class NonFiniteError(RuntimeError):
    """A metric became NaN or infinite."""


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
      NonFiniteError if a metric is NaN or infinite.
    """
    store = checkpoint.Checkpoints(
        workdir / "checkpoints",
        keep=options.keep,
        every=options.checkpoint_every,
    )
    with contextlib.closing(store):
        if store.latest_step() is not None:
            state, position = store.restore(state)
            batches.set_state(position["batches"])
            saved = jnp.asarray(position["key"], jnp.uint32)
            key = sharding.place(jax.random.wrap_key_data(saved), key.sharding)
        told = hosts.fetch(jax.jit(jax.random.key_data)(key))
        identity = {"key": told.tolist()}
        start = int(state.step)
        compiled = None
        with (
            _signals() as received,
            MetricsLog(workdir, start, store.latest_step) as log,
            progress.bar(options.name, options.steps, start) as bar,
        ):
            if start == 0:
                _make_calls(calls, 0, state, log)
            clock = time.perf_counter()
            for step in range(start, options.steps):
                batch = place(next(batches))
                if compiled is None:
                    placed = state, frozen, batch, key
                    compiled = compile_step(step_fn, placed)
                state, metrics = compiled(state, frozen, batch, key)
                done = step + 1
                if step == start:
                    jax.block_until_ready(state.step)
                    seconds = time.perf_counter() - clock
                    logging.info("%s: first step took %.1f s", options.name, seconds)
                last = done == options.steps
                if hosts.asked_to_stop(done):
                    received.append(signal.SIGTERM)
                stop = bool(received)
                called = any(done in call.at for call in calls)
                if done % options.log_every == 0 or last or store.due(done):
                    log.write(done, metrics, _batch_size(batch))
                elif stop or called:  # no line that a run without would not have
                    log.check(done, metrics)
                _make_calls(calls, done, state, log)
                bar.update(done, log.latest)
                if last or stop or store.due(done):
                    position = {**identity, "batches": batches.get_state()}
                    store.save(done, state, position)
                if stop:
                    break
            if received:
                raise StoppedBySignal(received[0])
    return state


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
        self.latest: dict[str, float] = {}

    def __enter__(self) -> "MetricsLog":
        if not hosts.is_first():
            return self
        import tensorboardX  # imports protobuf: 0.3 s that --help need not pay

        old = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in old if _step_of(line) <= self._start]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(self._path)
        self._file = open(self._path, "a")  # noqa: SIM115 - closed in __exit__
        self._board = tensorboardX.SummaryWriter(
            str(self._workdir), purge_step=self._start + 1
        )
        return self

    def check(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Fetches one step's metrics (the only host copy); NonFiniteError if one is.

        Those called concept/... are left out where they are NaN: of a concept that the
        step had no pair of.
        """
        values = {name: float(v) for name, v in jax.device_get(metrics).items()}
        values = {
            name: value
            for name, value in values.items()
            if not (name.startswith("concept/") and math.isnan(value))
        }
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            last = self._last_good()
            good = "no checkpoint yet" if last is None else f"last checkpoint: {last}"
            raise NonFiniteError(
                f"step {step}: {bad[0]} is {values[bad[0]]} ({good}). "
                "Lower the learning rate or bound the ascent."
            )
        return values

    def leave_out(self, seconds: float) -> None:
        """Counts seconds in which no step was taken out of the steps' time."""
        step, then = self._since
        self._since = (step, then + seconds)

    def write(self, step: int, metrics: Metrics, batch_size: int) -> None:
        """Fetches, checks and writes one step's metrics."""
        values = self.check(step, metrics)
        (old_step, old_time), now = self._since, time.perf_counter()
        if step > old_step:
            seconds = (now - old_time) / (step - old_step)
            values |= {
                "time/step_s": round(seconds, 5),
                "time/examples_per_s": round(batch_size / seconds, 2),
            }
        self._since = (step, now)
        self.latest = values
        if not hosts.is_first():
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def __exit__(self, *exc) -> None:
        if hosts.is_first():
            self._file.close()
            self._board.close()


@contextlib.contextmanager
def _signals():
    """Collects SIGINT and SIGTERM in a list instead of dying; a second one kills.

    Of several processes, JAX's own service takes SIGTERM: see `hosts.asked_to_stop`.
    """
    received: list[int] = []

    def handle(signum, _frame):
        received.append(signum)
        signal.signal(signum, signal.default_int_handler)
        logging.warning("signal %d: saving a checkpoint, then stopping", signum)

    old = {}
    alone = (signal.SIGTERM,) if jax.process_count() == 1 else ()
    for signum in (signal.SIGINT, *alone):
        with contextlib.suppress(ValueError):  # not in the main thread
            old[signum] = signal.signal(signum, handle)
    try:
        yield received
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the last line of a process that was killed as it wrote
        return math.inf


def _batch_size(batch: Any) -> int:
    leaves = jax.tree.leaves(batch)
    return int(leaves[0].shape[0]) if leaves else 0
