# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl and TensorBoard, and the check that numbers are finite."""

import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from gift_jax.runtime import files, processes
from gift_jax.runtime.errors import NonFiniteError
from gift_jax.state import Metrics
from gift_jax.training import checksums

PER_CONCEPT = ("concept/", "harmful_loss/")  # prefixes of metrics of single concepts


class MetricsLog:
    """Appends a JSON object for each logged step to metrics.jsonl, and to TensorBoard.

    Lines of steps after `start` (of a run that was stopped between a logged step and
    its checkpoint) are dropped, so that a resumed run repeats none. Of several
    processes the first one writes; all of them check.

    Args: latest_checkpoint: returns the newest checkpoint's step, or None, for errors.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        start: int,
        latest_checkpoint: Callable[[], int | None] = lambda: None,
    ):
        self._path = workdir / "metrics.jsonl"
        self._workdir = workdir
        self._start = start
        self._latest_checkpoint = latest_checkpoint
        self._since = (start, time.perf_counter())
        self._watched: list[str] = []
        self._first_bad = None
        self.latest: dict[str, float] = {}

    def __enter__(self) -> "MetricsLog":
        if not processes.is_main_process():
            return self
        tensorboardX = _import_tensorboard()
        self._file = files.AppendOnlyFile(
            self._path, keep=lambda line: _step_of(line) <= self._start
        )
        self._board = tensorboardX.SummaryWriter(
            str(self._workdir), purge_step=self._start + 1
        )
        return self

    def watch(self, step: jax.Array, metrics: Metrics) -> None:
        """Records, on the devices, the first step at which each metric is not finite.

        Those of `PER_CONCEPT` may be NaN: the step had no pair of that concept.
        """
        names = [name for name in metrics if not name.startswith(PER_CONCEPT)]
        self._watched = sorted(names, key=lambda name: ("loss" not in name, name))
        values = tuple(metrics[name] for name in self._watched)
        if self._first_bad is None:
            self._first_bad = np.full(len(names), -1, np.int32)
        self._first_bad = _first_non_finite(self._first_bad, step, values)

    def check(
        self, step: int, metrics: Metrics, params: Mapping[str, jax.Array] | None = None
    ) -> dict[str, float]:
        """Returns one step's metrics on the host, having checked every step's so far.

        Args: params: to be checked too; all processes call.
        Raises: NonFiniteError naming the step, the metric and the parameter.
        """
        host_metrics, first_bad = jax.device_get((metrics, self._first_bad))
        values = {
            name: float(value)
            for name, value in host_metrics.items()
            if not (name.startswith(PER_CONCEPT) and math.isnan(value))
        }
        first_bad = [] if first_bad is None else first_bad.tolist()
        bad_steps = {
            name: bad_step
            for name, bad_step in zip(self._watched, first_bad, strict=False)
            if bad_step >= 0
        }
        bad_params = checksums.non_finite(params) if params or bad_steps else []
        if bad_steps:
            name = min(bad_steps, key=lambda name: bad_steps[name])
            raise self._error(bad_steps[name], name, values[name], bad_params)
        if bad_params:
            raise self._error(step, f"parameter {bad_params[0]}", math.nan, [])
        return values

    def _error(self, step: int, name: str, value: float, bad_params: list[str]):
        latest = self._latest_checkpoint()
        checkpoint = f"last checkpoint: {latest}" if latest else "no checkpoint yet"
        text = value if not math.isfinite(value) else "not finite"
        parameter = f"; so is the parameter {bad_params[0]}" if bad_params else ""
        return NonFiniteError(
            f"step {step}: {name} is {text}{parameter} ({checkpoint}). Lower the "
            "learning rate, or bound the ascent, and use another --workdir."
        )

    def leave_out(self, seconds: float) -> None:
        """Excludes seconds in which no step was taken from the steps' time."""
        step, then = self._since
        self._since = (step, then + seconds)

    def write(self, step: int, values: dict[str, float], batch_size: int) -> None:
        """Writes one step's metrics, as `check` returns them, with the time a step."""
        (old_step, old_time), now = self._since, time.perf_counter()
        if step > old_step:
            seconds = (now - old_time) / (step - old_step)
            values = values | {
                "time/step_s": round(seconds, 5),
                "time/examples_per_s": round(batch_size / seconds, 2),
            }
        self._since = (step, now)
        self.latest = values
        if not processes.is_main_process():
            return
        self._file.add(json.dumps({"step": step, **values}))
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def __exit__(self, *exc) -> None:
        if processes.is_main_process():
            self._file.close()
            self._board.close()


@jax.jit
def _first_non_finite(first_M, step, values):
    """Returns int32 "M": the first step at which each metric was not finite, or -1."""
    bad_M = ~jnp.stack([jnp.all(jnp.isfinite(value)) for value in values])
    return jnp.where(bad_M & (first_M < 0), step, first_M)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the last line of a process that was killed while writing
        return math.inf


def _import_tensorboard():
    """Returns tensorboardX, which imports PyTorch wherever that is installed.

    That takes longer than all the rest of a run's start, and nothing here needs it.
    """
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None
    try:
        import tensorboardX  # imports protobuf: 0.3 s that --help need not pay
    finally:
        if hide:
            del sys.modules["torch"]
    return tensorboardX
