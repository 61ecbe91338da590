# SPDX-License-Identifier: Apache-2.0
"""Several processes of one run: how they find one another, and which one speaks.

On TPU pods, under Slurm, Open MPI and on GKE each process learns from its environment
who the others are; elsewhere config.processes says it. Every process takes every step;
the first one alone writes logs, pictures and exports. The workdir is one folder that
all of them see.
"""

import inspect
import os
import pathlib
import signal
import subprocess
import sys
import threading
from typing import Any

import jax
import numpy as np
from absl import logging

from gift_jax.runtime import signals
from gift_jax.runtime.errors import UserError

LOST_AFTER_S = 20  # without a sign of life, a process counts as dead
_WAIT_S = 300  # for the others to start
_SEVERAL = {  # variable: how many processes it tells of
    "SLURM_NTASKS": int,
    "OMPI_COMM_WORLD_SIZE": int,
    "TPU_WORKER_HOSTNAMES": lambda names: len(names.split(",")),
}
_WATCHED = "GIFT_JAX_WATCHED"  # a pipe's end, in a process that another one watches
EXIT_PEER_DIED = 75  # exit code of a process that has lost the others
_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")  # of a TPU VM: JAX asks its metadata


def check(processes: Any) -> None:
    """Raises UserError if `config.processes` names its run half."""
    given = bool(processes.coordinator), processes.count > 0, processes.index >= 0
    if any(given) and not all(given):
        raise UserError(
            "config.processes needs all of coordinator, count and index, or none; try "
            "--config.processes.coordinator=HOST:1234 --config.processes.count=2 "
            "--config.processes.index=0"
        )
    if all(given) and processes.index >= processes.count:
        raise UserError(
            f"config.processes.index={processes.index} must be below "
            f"count={processes.count}"
        )


def connect(processes: Any) -> None:
    """Joins the run's other processes, if there are any; before JAX's first use.

    Args: processes: the group `config.processes`: coordinator, "HOST:PORT" of process
      0; count; index of this one. Empty: what the environment says.
    This process then becomes the watcher of a child that does the work: it does not
    return, but exits as the child did, or with `LOST` where another process died.

    Raises: UserError if the others do not answer.
    """
    check(processes)
    initialize, known = jax.distributed.initialize, {}
    if processes.coordinator:
        known = {
            "coordinator_address": processes.coordinator,
            "num_processes": processes.count,
            "process_id": processes.index,
        }
    elif not _launched_by_cluster():
        return
    if _WATCHED not in os.environ:
        sys.exit(_watch())
    threading.Thread(target=_end_with_watcher, daemon=True).start()
    if "heartbeat_timeout_seconds" in inspect.signature(initialize).parameters:
        known["heartbeat_timeout_seconds"] = LOST_AFTER_S
    try:
        initialize(**known, initialization_timeout=_WAIT_S)
    except (RuntimeError, ValueError) as error:
        where = processes.coordinator or "the coordinator that the environment names"
        what = " ".join(str(error).split())
        raise UserError(
            f"the run's other processes do not answer through {where} ({what:.200}); "
            "start all of them, with one coordinator, count and an index each"
        ) from error
    logging.info("process %d of %d", jax.process_index(), jax.process_count())
    if not is_main_process():
        logging.set_verbosity(logging.WARNING)


def _watch() -> int:
    """Runs this command in a child and says in a line what ended it; its exit code.

    Where another process dies, JAX aborts this one from a thread of its own, without
    an exception, some seconds later.
    """
    end, _kept = os.pipe()  # closed, so to speak, when this process is gone
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=os.environ | {_WATCHED: str(end)},
        pass_fds=(end,),
    )
    signals.be_patient(True)  # the child decides when to end
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, _: child.send_signal(signum))
    code = child.wait()
    if code == -signal.SIGABRT:
        print(
            "error: another process of this run has died, or cannot be reached; its "
            "log says why. Start all of them again with the same command: they go on "
            "from the newest checkpoint",
            file=sys.stderr,
        )
        return EXIT_PEER_DIED
    return code if code >= 0 else 128 - code


def _end_with_watcher() -> None:
    if not os.read(int(os.environ[_WATCHED]), 1):
        os._exit(128 + signal.SIGKILL)  # as the watcher was, most likely


def are_several(processes: Any) -> bool:
    """Whether this process is one of several, as `connect` would find."""
    return bool(processes.coordinator) or _launched_by_cluster()


def _launched_by_cluster() -> bool:
    for name, count in _SEVERAL.items():
        if name in os.environ and count(os.environ[name]) > 1:
            return True
    on_tpu = any(pathlib.Path(device).exists() for device in _TPU_DEVICES)
    return on_tpu and "cpu" not in os.environ.get("JAX_PLATFORMS", "")


def is_main_process() -> bool:
    """Whether this process is the one that writes; of a single process, it is."""
    return jax.process_index() == 0


def to_host(tree: Any) -> Any:
    """Returns a pytree of global arrays as NumPy arrays, whole; all processes call."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    def whole(a):
        if not isinstance(a, jax.Array) or a.is_fully_replicated:
            return np.asarray(a)
        return multihost_utils.process_allgather(a, tiled=True)

    return jax.tree.map(whole, tree)


def all_sum(numbers: np.ndarray) -> np.ndarray:
    """Returns the sum of every process's integers, uint64 "N"; all processes call."""
    if jax.process_count() == 1:
        return numbers
    from jax.experimental import multihost_utils

    halves = np.stack([numbers >> 32, numbers & 0xFFFFFFFF]).astype(np.uint32)  # no x64
    every = np.asarray(multihost_utils.process_allgather(halves)).astype(np.uint64)
    return ((every[:, 0] << 32) + every[:, 1]).sum(axis=0, dtype=np.uint64)


def wait_for_all(why: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(why)


def preempted(step: int) -> bool:
    """Whether some process got SIGTERM, and all are to stop after this same step."""
    if jax.process_count() == 1:
        return False
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)
