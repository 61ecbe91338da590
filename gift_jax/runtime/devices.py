# SPDX-License-Identifier: Apache-2.0
"""Setting JAX up: CPU devices, compilation cache, TPU flags."""

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

TPU_FLAGS = (  # of libtpu: no images cut into pieces that make a batch of eight
    "--xla_tpu_run_space_to_batch=false",
    "--xla_tpu_run_space_to_batch_on_new_platforms=false",
)
_CACHE_BYTES = 4 * 2**30  # of compiled programs, some MB each
CACHE_MIN_COMPILE_S = 0.0  # of compiling: also what is quick, as there are hundreds


def init_jax(cpu_devices: int = 1) -> None:
    """Sets JAX up; before anything else touches it, other processes included.

    Turns on the persistent compilation cache, in the `cache_folder`: a second run
    compiles nothing. Processes may share it, and what has not been used for longest is
    dropped at `_CACHE_BYTES`. On TPUs convolutions are computed as they stand, unless
    the environment's LIBTPU_INIT_ARGS says something else; docs/scaling.md has why.

    Args: cpu_devices: into how many devices to divide a machine without accelerator;
      see `cpu_devices_for`.
    """
    if cpu_devices < 1:
        raise UserError(f"config.cpu_devices={cpu_devices} must be at least 1; try 1")
    if cpu_devices > 1:
        # XLA's threads, of which each device would otherwise want all
        os.environ.setdefault("NPROC", str(max(1, num_cores() // cpu_devices)))
        try:
            jax.config.update("jax_num_cpu_devices", cpu_devices)
        except RuntimeError:  # JAX has started already, with what it has
            logging.debug("JAX runs with %d devices already", jax.device_count())
    os.environ.setdefault("LIBTPU_INIT_ARGS", " ".join(TPU_FLAGS))
    folder = files.cache_folder() / "xla"
    _tidy(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _CACHE_BYTES)  # and its lock
    jax.config.update("jax_persistent_cache_min_compile_time_secs", CACHE_MIN_COMPILE_S)
    malloc.retain_freed_memory()


def _tidy(folder: pathlib.Path) -> None:
    """Drops the programs that a process left half written when it was killed.

    JAX writes the time of use after the program, both under its lock, and fails to
    read or to replace a program that is not whole.
    """
    with contextlib.suppress(OSError):  # JAX says so, and goes on without a cache
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


def cpu_devices_for(parts: Sequence[int], shape: Mapping[str, int]) -> int:
    """Returns into how many devices to divide the cores: one each, if all goes evenly.

    One device a core takes half the time of one for both of two: XLA leaves most of a
    small model's operations on one thread.

    Args: parts: batches that are to be divided, less what `accumulate` divides them in.
      shape: of the mesh, see `lay_out`.
    """
    given = math.prod(n for n in shape.values() if n)
    if 0 not in shape.values():
        return given

    def fits(n: int) -> bool:
        pieces = n // shape["tensor"] if shape["tensor"] else given
        return n % given == 0 and all(part % pieces == 0 for part in parts)

    return next((n for n in range(num_cores(), given, -1) if fits(n)), given)
