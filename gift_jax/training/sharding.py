# SPDX-License-Identifier: Apache-2.0
"""Devices: one mesh, rules that say which parameter lies where, and placing.

The mesh has three axes. A batch is divided over `data` and `fsdp`; parameters that are
large, their gradients and their optimiser's states over `fsdp` too, and the matrices of
attention and of feed-forward layers over `tensor`. What no rule names, or what does not
divide evenly, is repeated.
"""

import math
import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gift_jax.runtime.devices import init_jax
from gift_jax.runtime.errors import UserError

AXES = ("data", "fsdp", "tensor")
RULES = (  # of a parameter's path: the axes of its last dimensions
    (r"(to_[qkv]|net_0/proj|[qkv]_proj|fc1)/kernel", ("fsdp", "tensor")),
    (r"(to_out_0|net_2|fc2|out_proj)/kernel", ("tensor", "fsdp")),
    (r"(kernel|embedding)", ("fsdp",)),
)
_BATCH = PartitionSpec(("data", "fsdp"))


def make_default_mesh(cpu_devices: int = 1) -> Mesh:
    """Returns the mesh of all devices along data; see `prepare`."""
    init_jax(cpu_devices)
    return make_mesh(jax.devices())


def make_mesh(devices, shape: Mapping[str, int] | None = None) -> Mesh:
    """Returns the mesh of some devices.

    Args: shape: devices along each of `AXES`; one of them may be 0: all that the others
      leave. By default all are along data.
    Raises: UserError if the devices cannot be laid out so.
    """
    shape = dict(shape or {"data": 0, "fsdp": 1, "tensor": 1})
    # In their order: a process's devices are neighbours, so its rows of a batch are.
    return Mesh(np.asarray(devices).reshape(_sizes(shape, len(devices))), AXES)


def _sizes(shape: dict[str, int], total: int) -> tuple[int, ...]:
    """Returns the number of devices along each axis; UserError if they do not fit."""
    told = ", ".join(f"{axis}={shape[axis]}" for axis in AXES)
    check_mesh(shape)
    given = math.prod(n for n in shape.values() if n)
    if total % given or (0 not in shape.values() and given != total):
        raise UserError(
            f"config.mesh has {told}, but there are {total} devices; try "
            "--config.mesh.data=0 (all that the others leave), with fsdp and tensor "
            "whose product divides that"
        )
    return tuple(shape[axis] or total // given for axis in AXES)


def check_mesh(shape: Mapping[str, int]) -> None:
    """Raises UserError for a mesh of negative sizes, or with two left open."""
    for axis in AXES:
        if shape[axis] < 0:
            raise UserError(
                f"config.mesh.{axis}={shape[axis]} must be at least 0; try 1"
            )
    if sum(shape[axis] == 0 for axis in AXES) > 1:
        raise UserError(
            "config.mesh has more than one axis of 0, all that the others leave; try "
            "--config.mesh.fsdp=1 --config.mesh.tensor=1"
        )


def partition_spec(
    path: str, shape: tuple[int, ...], sizes: Mapping[str, int]
) -> PartitionSpec:
    """Returns how a parameter is divided, by the first of `RULES` that fits.

    Args: path: "down_blocks_0/attentions_0/.../to_q/kernel". sizes: of the mesh's axes;
      one that is left out, or 1, divides nothing.
    """
    for pattern, axes in RULES:
        if re.search(rf"(^|/){pattern}$", path) and len(axes) <= len(shape):
            dims = zip(shape[-len(axes) :], axes, strict=True)
            last = [
                axis if sizes.get(axis, 1) > 1 and dim % sizes[axis] == 0 else None
                for dim, axis in dims
            ]
            return PartitionSpec(*[None] * (len(shape) - len(axes)), *last)
    return PartitionSpec()


def shardings(mesh: Mesh, tree, *, repeat: tuple[str, ...] = ()):
    """Returns the `NamedSharding` of every leaf of a tree of parameters or states.

    A leaf's path is that of its dict keys, joined; optimiser states hold dicts of the
    parameters' paths, and so lie as these do.

    Args: repeat: axes over which nothing is to be divided.
    """
    sizes = {axis: n for axis, n in mesh.shape.items() if axis not in repeat}

    def place_of(keys, leaf):
        path = "/".join(str(k.key) for k in keys if hasattr(k, "key"))
        return NamedSharding(mesh, partition_spec(path, np.shape(leaf), sizes))

    return jax.tree_util.tree_map_with_path(place_of, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what lies whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch, its leading axis divided."""
    return NamedSharding(mesh, _BATCH)


def put(tree, shardings):
    """Places a tree of arrays that every process has whole; returns global arrays.

    Args: shardings: of every leaf, or one for all.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(_put_part, tree, shardings)


def _put_part(a, where: NamedSharding) -> jax.Array:
    """Returns a global array of which this process places what its devices hold."""
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
        data = _put_part(jax.random.key_data(a), where)
        return jax.jit(jax.random.wrap_key_data)(data)
    local = np.asarray(a)
    return jax.make_array_from_callback(local.shape, where, lambda at: local[at])


def replicate(mesh: Mesh, tree):
    """Places a pytree of arrays whole on every device."""
    return put(tree, replicated(mesh))


def process_slice(mesh: Mesh) -> tuple[int, int]:
    """Returns (which part of each batch this process reads, of how many parts)."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    where = batch_sharding(mesh).addressable_devices_indices_map((parts,))
    mine = sorted({rows.indices(parts)[0] for (rows,) in where.values()})
    if mine != list(range(mine[0], mine[0] + len(mine))) or mine[0] % len(mine):
        raise UserError(
            "config.mesh divides a batch so that a process's rows are no neighbours; "
            "try --config.mesh.tensor=1"
        )
    return mine[0] // len(mine), parts // len(mine)


def put_batch(mesh: Mesh, batch):
    """Places a batch, of which this process has its `share`, over the devices."""
    where = batch_sharding(mesh)
    return jax.tree.map(
        lambda a: jax.make_array_from_process_local_data(where, a), batch
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
