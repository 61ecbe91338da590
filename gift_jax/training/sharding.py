# SPDX-License-Identifier: Apache-2.0
"""The device mesh, what divides parameters over it, and placing arrays on it.

The mesh has three axes. A batch is divided over `data` and `fsdp`; large parameters,
their gradients and their optimizer states over `fsdp` too, and the matrices of
attention and of feed-forward layers over `tensor`. Arrays that no rule matches, or that
do not divide evenly, are replicated.
"""

import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gift_jax.models.base import PartitionRules
from gift_jax.runtime.devices import init_jax
from gift_jax.runtime.errors import UserError

AXES = ("data", "fsdp", "tensor")
_FIELD = "config.hardware.mesh"
_BATCH = PartitionSpec(("data", "fsdp"))


def make_default_mesh(cpu_devices: int = 1) -> Mesh:
    """Returns the mesh of all devices along data, after `init_jax`."""
    init_jax(cpu_devices)
    return make_mesh(jax.devices())


def make_mesh(devices, shape: Mapping[str, int] | None = None) -> Mesh:
    """Returns a mesh of devices.

    Args: shape: the number along each of `AXES`; one of them may be 0: all that the
      others leave. By default all are along data.
    Raises: UserError if the number of devices does not fit the shape.
    """
    shape = dict(shape or {"data": 0, "fsdp": 1, "tensor": 1})
    # In order: a process's devices are neighbors, and so its rows of a batch are.
    return Mesh(np.asarray(devices).reshape(_sizes(shape, len(devices))), AXES)


def _sizes(shape: dict[str, int], total: int) -> tuple[int, ...]:
    """Returns the number of devices along each axis; UserError if they do not fit."""
    check_mesh(shape)
    fixed = math.prod(n for n in shape.values() if n)
    if total % fixed or (0 not in shape.values() and fixed != total):
        sizes = ", ".join(f"{axis}={shape[axis]}" for axis in AXES)
        raise UserError(
            f"{_FIELD} has {sizes}, but there are {total} devices; try "
            f"--{_FIELD}.data=0 (all that the others leave), with fsdp and tensor "
            "whose product divides that"
        )
    return tuple(shape[axis] or total // fixed for axis in AXES)


def check_mesh(shape: Mapping[str, int]) -> None:
    """Raises UserError for a mesh of negative sizes, or with two left open."""
    for axis in AXES:
        if shape[axis] < 0:
            raise UserError(f"{_FIELD}.{axis}={shape[axis]} must be at least 0; try 1")
    if sum(shape[axis] == 0 for axis in AXES) > 1:
        raise UserError(
            f"{_FIELD} has more than one axis of 0, all that the others leave; try "
            f"--{_FIELD}.fsdp=1 --{_FIELD}.tensor=1"
        )


def partition_spec(
    path: str,
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    rules: PartitionRules,
) -> PartitionSpec:
    """Returns how a parameter is divided, by the first rule that matches.

    Args: path: "down_blocks_0/attentions_0/.../to_q/kernel". sizes: of the mesh's axes;
      one that is left out, or 1, divides nothing. rules: of the model: (regular
      expression of the end of a path, axes of the last dimensions).
    """
    for pattern, axes in rules:
        if re.search(rf"(^|/){pattern}$", path) and len(axes) <= len(shape):
            dims = zip(shape[-len(axes) :], axes, strict=True)
            last = [
                axis if sizes.get(axis, 1) > 1 and dim % sizes[axis] == 0 else None
                for dim, axis in dims
            ]
            return PartitionSpec(*[None] * (len(shape) - len(axes)), *last)
    return PartitionSpec()


def shardings(mesh: Mesh, tree, rules: PartitionRules, *, repeat: Sequence[str] = ()):
    """Returns the `NamedSharding` of every leaf of a tree of parameters or states.

    A leaf's path is that of its dict keys, joined; optimizer states contain dicts with
    the parameters' paths, and so are divided as the parameters are.

    Args: rules: see `partition_spec`. repeat: axes over which nothing is divided.
    """
    sizes = {axis: n for axis, n in mesh.shape.items() if axis not in repeat}

    def sharding_of(keys, leaf):
        path = "/".join(str(k.key) for k in keys if hasattr(k, "key"))
        spec = partition_spec(path, np.shape(leaf), sizes, rules)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that are whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch, its leading axis divided."""
    return NamedSharding(mesh, _BATCH)


def put(tree, shardings):
    """Returns a tree, whole on every process, as global arrays on the devices.

    Args: shardings: of every leaf, or one for all.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(_put_part, tree, shardings)


def _put_part(a, sharding: NamedSharding) -> jax.Array:
    """Returns a global array of which this process places the shards of its devices."""
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
        data = _put_part(jax.random.key_data(a), sharding)
        return jax.jit(jax.random.wrap_key_data)(data)
    whole = np.asarray(a)
    return jax.make_array_from_callback(whole.shape, sharding, lambda at: whole[at])


def replicate(mesh: Mesh, tree):
    """Places a pytree of arrays whole on every device."""
    return put(tree, replicated(mesh))


def process_slice(mesh: Mesh) -> tuple[int, int]:
    """Returns (which part of each batch this process reads, of how many parts)."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    indices = batch_sharding(mesh).addressable_devices_indices_map((parts,))
    rows = sorted({index.indices(parts)[0] for (index,) in indices.values()})
    if rows != list(range(rows[0], rows[0] + len(rows))) or rows[0] % len(rows):
        raise UserError(
            f"{_FIELD} divides a batch so that a process's rows are no neighbors; try "
            f"--{_FIELD}.tensor=1"
        )
    return rows[0] // len(rows), parts // len(rows)


def put_batch(mesh: Mesh, batch):
    """Places a batch on the devices; this process has its `process_slice` of it."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda a: jax.make_array_from_process_local_data(sharding, a), batch
    )


def check_batch(field: str, batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises UserError if a batch cannot be divided over the devices, and in parts.

    Args: accumulate: parts of the batch that are computed one after the other.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (parts * accumulate):
        fix = parts * accumulate * max(1, batch_size // (parts * accumulate))
        several = f" in {accumulate} parts" if accumulate > 1 else ""
        raise UserError(
            f"{field}={batch_size} must divide by {parts} devices{several}; "
            f"try --config.{field}={fix}"
        )
