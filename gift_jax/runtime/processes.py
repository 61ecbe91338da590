# SPDX-License-Identifier: Apache-2.0
"""Several processes of one run: joining them, exchanging arrays, and a peer's death.

On TPU pods, under Slurm, Open MPI and on GKE each process learns from its environment
who the others are; elsewhere config.hardware.processes says it. Every process takes
every step; process 0 alone writes logs, images and exports. All see the workdir.
"""

import ctypes
import inspect
import os
import pathlib
import signal
from typing import Any

import jax
import numpy as np
from absl import logging

from gift_jax.runtime.errors import UserError

LOST_AFTER_S = 20  # without a sign of life, a process counts as dead
_FIELD = "config.hardware.processes"
_WAIT_S = 300  # for the others to start
_CLUSTER_VARIABLES = {  # of the environment: how many processes one names
    "SLURM_NTASKS": int,
    "OMPI_COMM_WORLD_SIZE": int,
    "TPU_WORKER_HOSTNAMES": lambda names: len(names.split(",")),
}
EXIT_PEER_DIED = 75  # exit code of a process that has lost another one
_PEER_DIED = """error: another process of this run has died, or cannot be reached; its \
log says why. Start all of them again with the same command: they go on from the \
newest checkpoint
"""
_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")  # of a TPU VM: JAX asks its metadata


def check(processes: Any) -> None:
    """Raises UserError if `config.hardware.processes` is set only in part."""
    fields = bool(processes.coordinator), processes.count > 0, processes.index >= 0
    if any(fields) and not all(fields):
        raise UserError(
            f"{_FIELD} needs all of coordinator, count and index, or none; try "
            f"--{_FIELD}.coordinator=HOST:1234 --{_FIELD}.count=2 --{_FIELD}.index=0"
        )
    if all(fields) and processes.index >= processes.count:
        raise UserError(
            f"{_FIELD}.index={processes.index} must be below count={processes.count}"
        )


def connect(processes: Any) -> None:
    """Joins the run's other processes, if there are any; before JAX's first use.

    Where another one dies later, JAX aborts this one within `LOST_AFTER_S` and some
    seconds, and it ends with the exit code `EXIT_PEER_DIED`.

    Args: processes: the group `config.hardware.processes`: coordinator, "HOST:PORT" of
      process 0; count; index of this one. Empty: what the environment says.
    Raises: UserError if the others do not answer.
    """
    check(processes)
    options: dict[str, Any] = {"heartbeat_timeout_seconds": LOST_AFTER_S}
    if processes.coordinator:
        options["coordinator_address"] = processes.coordinator
        options["num_processes"] = processes.count
        options["process_id"] = processes.index
    elif not _launched_by_cluster():
        return
    initialize = jax.distributed.initialize
    if "heartbeat_timeout_seconds" not in inspect.signature(initialize).parameters:
        del options["heartbeat_timeout_seconds"]  # older JAX
    try:
        initialize(**options, initialization_timeout=_WAIT_S)
    except (RuntimeError, ValueError) as error:
        where = processes.coordinator or "the coordinator that the environment names"
        reason = " ".join(str(error).split())
        raise UserError(
            f"the run's other processes do not answer through {where} ({reason:.200}); "
            "start all of them, with one coordinator, count and an index each"
        ) from error
    logging.info("process %d of %d", jax.process_index(), jax.process_count())
    if jax.process_count() > 1:
        ctypes.pythonapi.PyOS_setsig(signal.SIGABRT, _explain_abort)
    if not is_main_process():
        logging.set_verbosity(logging.WARNING)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _explain_abort(signum):
    """Ends this process, which JAX aborts because it has lost another one.

    JAX does so from a thread of its own, without an exception and with a message that
    names its coordination service. A handler in C runs in that thread, where one of
    Python's would wait for the main thread.
    """
    os.write(2, _PEER_DIED.encode())
    os._exit(EXIT_PEER_DIED)


def are_several(processes: Any) -> bool:
    """Whether this process is one of several, decided as `connect` does."""
    return bool(processes.coordinator) or _launched_by_cluster()


def _launched_by_cluster() -> bool:
    for name, count in _CLUSTER_VARIABLES.items():
        if name in os.environ and count(os.environ[name]) > 1:
            return True
    on_tpu = any(pathlib.Path(device).exists() for device in _TPU_DEVICES)
    return on_tpu and "cpu" not in os.environ.get("JAX_PLATFORMS", "")


def is_main_process() -> bool:
    """Whether this process is the one that writes; a single process is."""
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
    all_halves = np.asarray(multihost_utils.process_allgather(halves))
    high, low = np.moveaxis(all_halves.astype(np.uint64), 1, 0)
    return ((high << 32) + low).sum(axis=0, dtype=np.uint64)


def wait_for_all(reason: str) -> None:
    """Returns when every process has called it."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(reason)


def preempted(step: int) -> bool:
    """Whether some process got SIGTERM and all are to stop after this step.

    Args: step: the number of steps done; every process calls it after every step.
    """
    if jax.process_count() == 1:
        return False
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)
