# SPDX-License-Identifier: Apache-2.0
"""Devices: one mesh over which batches are divided and everything else is repeated."""

import os
import pathlib

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gift_jax.config import UserError


def cache_folder() -> pathlib.Path:
    """Returns the folder for what may be made again: GIFT_JAX_CACHE or ~/.cache."""
    named = os.environ.get("GIFT_JAX_CACHE") or "~/.cache/gift_jax"
    return pathlib.Path(named).expanduser()


def start(cpu_devices: int = 1) -> Mesh:
    """Returns the mesh over all devices; call before anything else touches JAX.

    Also turns on the persistent compilation cache, in the `cache_folder`: a second run
    compiles nothing.

    Args: cpu_devices: into how many devices to divide a machine without accelerator.
      One a core trains faster than one for all: XLA leaves many operations on one
      thread.
    """
    if cpu_devices < 1:
        raise UserError(f"config.cpu_devices={cpu_devices} must be at least 1; try 1")
    if cpu_devices > 1:
        try:
            jax.config.update("jax_num_cpu_devices", cpu_devices)
        except RuntimeError:  # JAX has started already, with what it has
            logging.warning("cpu_devices=%d comes too late: ignored", cpu_devices)
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
    return Mesh(np.asarray(jax.devices()), ("data",))


def replicate(mesh: Mesh, tree):
    """Places a pytree of arrays whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split(mesh: Mesh, batch):
    """Places a batch with its leading axis divided over the devices."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def check_batch(field: str, batch_size: int, devices: int) -> None:
    """Raises UserError if a batch cannot be divided over the devices."""
    if batch_size % devices:
        fix = devices * max(1, batch_size // devices)
        raise UserError(
            f"{field}={batch_size} must divide by {devices} devices; "
            f"try --config.{field}={fix}"
        )
