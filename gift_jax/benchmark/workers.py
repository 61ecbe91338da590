# SPDX-License-Identifier: Apache-2.0
"""Several processes on one benchmark's folder, each with its share of the cores."""

import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Sequence

from gift_jax.benchmark import cells, store
from gift_jax.benchmark.matrix import Matrix
from gift_jax.runtime import progress
from gift_jax.runtime.errors import CommandExit, StoppedBySignal, UserError

_POLL_S = 2.0
_GRACE_S = 60.0  # for a worker to save what it has


class WorkerError(CommandExit):
    """A worker ended before its cells were done; its log says why."""

    exit_code = 1


def check(count: int, cores: int) -> None:
    """Raises UserError for a number of workers that the cores do not allow."""
    if not 1 <= count <= cores:
        raise UserError(
            f"--workers={count} must be between 1 and {cores}, the cores of this "
            f"machine; try --workers={max(1, min(count, cores))}"
        )


def take_cores(index: int, count: int) -> None:
    """Gives this process, number index of count, its share of the cores."""
    if hasattr(os, "sched_setaffinity"):
        own = sorted(os.sched_getaffinity(0))[index::count]
        os.sched_setaffinity(0, own)


def run(matrix: Matrix, workdir: pathlib.Path, argv: Sequence[str], count: int) -> None:
    """Runs a benchmark's cells in `count` processes of the same command.

    Each takes what nobody has; the cell of one that is killed is taken by another, or
    by the next run. Raises: WorkerError if cells are left when all have ended.
    """
    results = store.Store(workdir)
    left = cells.unfinished(matrix, results)
    if not left:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    children = [_start(argv, workdir, index, count) for index in range(count)]
    total = len(matrix.cells)
    try:
        with progress.bar("cells", total, total - len(left)) as bar:
            while any(child.poll() is None for child in children):
                _wait(children)
                bar.update(total - len(cells.unfinished(matrix, results)))
    except (StoppedBySignal, KeyboardInterrupt):
        _stop(children)
        raise
    _check_ended(matrix, results, workdir, children)


def log_path(workdir: pathlib.Path, index: int) -> pathlib.Path:
    """Returns where a worker's messages are."""
    return workdir / f"worker_{index}.log"


def _start(
    argv: Sequence[str], workdir: pathlib.Path, index: int, count: int
) -> subprocess.Popen:
    command = [sys.executable, "-m", "gift_jax.benchmark", *argv]
    command += [f"--worker={index}/{count}"]
    with open(log_path(workdir, index), "ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def _wait(children: Sequence[subprocess.Popen]) -> None:
    for child in children:
        if child.poll() is None:
            try:
                child.wait(_POLL_S)
            except subprocess.TimeoutExpired:
                return


def _stop(children: Sequence[subprocess.Popen]) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
    for child in children:
        try:
            child.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()


def _check_ended(matrix, results, workdir, children) -> None:
    left = cells.unfinished(matrix, results)
    if not left:
        return
    codes = [child.returncode for child in children]
    index = next((i for i, code in enumerate(codes) if code), 0)
    path = log_path(workdir, index)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    mistakes = [line for line in lines if line.startswith("error: ")]
    reason = mistakes[-1].removeprefix("error: ") if mistakes else f"see {path}"
    if codes[index] == UserError.exit_code:
        raise UserError(reason)
    raise WorkerError(
        f"{len(left)} of {len(matrix.cells)} cells are left; worker {index} ended with "
        f"code {codes[index]}: {reason}; run the same command to go on"
    )
