# SPDX-License-Identifier: Apache-2.0
"""Setting up JAX: CPU devices, compilation cache, TPU flags, memory of CPU steps."""

import contextlib
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import filelock
import jax
from absl import logging

from gift_jax.runtime import files, malloc
from gift_jax.runtime.errors import UserError

TPU_FLAGS = (  # of libtpu: do not cut images into pieces that make a batch of eight
    "--xla_tpu_run_space_to_batch=false",
    "--xla_tpu_run_space_to_batch_on_new_platforms=false",
)
_CACHE_BYTES = 4 * 2**30  # of compiled programs, some MB each
CACHE_MIN_COMPILE_S = 0.1  # to add a program, JAX looks at all that are there


def init_jax(cpu_devices: int = 1) -> None:
    """Sets up JAX, before its first use.

    Turns on the persistent compilation cache, in the `cache_folder`: a second run
    compiles only what is quick. Processes may share it; the least recently used
    programs are dropped at `_CACHE_BYTES`. Sets `TPU_FLAGS` unless the environment has
    LIBTPU_INIT_ARGS; docs/lab/speed.md says why.

    Args: cpu_devices: into how many devices to divide a machine without accelerator;
      see `cpu_devices_for`.
    """
    if cpu_devices < 1:
        raise UserError(f"cpu_devices={cpu_devices} must be at least 1; try 1")
    if cpu_devices > 1:
        # XLA's threads, of all devices: one for each, which may wait there for others
        os.environ.setdefault("NPROC", str(max(num_cores(), cpu_devices)))
        try:
            jax.config.update("jax_num_cpu_devices", cpu_devices)
        except RuntimeError:  # JAX has started already
            logging.debug("JAX runs with %d devices already", jax.device_count())
    os.environ.setdefault("LIBTPU_INIT_ARGS", " ".join(TPU_FLAGS))
    keep_programs(files.cache_folder() / "xla")
    malloc.retain_freed_memory()


def keep_programs(folder: pathlib.Path) -> None:
    """Has JAX keep compiled programs in a folder, which processes may share."""
    _remove_incomplete_programs(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)  # and its lock
    jax.config.update("jax_persistent_cache_min_compile_time_secs", CACHE_MIN_COMPILE_S)


def _remove_incomplete_programs(folder: pathlib.Path) -> None:
    """Removes the programs that a killed process has left half written in the cache.

    JAX writes the time of use after the program, both under its lock, and can neither
    read nor replace an incomplete program.
    """
    with contextlib.suppress(OSError):  # JAX warns, and goes on without a cache
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".lockfile", timeout=10):
            for program in folder.glob("*-cache"):
                if not program.with_name(program.name[:-5] + "atime").exists():
                    program.unlink()


def num_cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_devices_for(batches: Sequence[float], shape: Mapping[str, int]) -> int:
    """Returns into how many devices to divide the cores: one a core, if batches divide.

    Two devices on two cores take half the time of one device: XLA leaves most of a
    small model's operations on one thread.

    Args: batches: sizes of the (micro-)batches to divide. shape: of the mesh, see
      `sharding.make_mesh`.
    """
    fixed = math.prod(n for n in shape.values() if n)
    if 0 not in shape.values():
        return fixed

    def fits(n: int) -> bool:
        parts = n // shape["tensor"] if shape["tensor"] else fixed
        return n % fixed == 0 and all(size % parts == 0 for size in batches)

    return next((n for n in range(num_cores(), fixed, -1) if fits(n)), fixed)
