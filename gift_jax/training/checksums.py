# SPDX-License-Identifier: Apache-2.0
"""Checksums of arrays, and the search for NaN, over all devices and processes.

Each process looks at its own shards; the results are summed, so that they do not depend
on how an array is divided. All processes call these functions together.
"""

import json
import zlib
from typing import Any

import jax
import numpy as np

from gift_jax.runtime import processes


def tree_path(keys) -> str:
    """Returns a leaf's path in a pytree, such as "params/a/kernel"."""
    names = ("name", "key", "idx")
    return "/".join(
        str(next(getattr(key, n) for n in names if hasattr(key, n))) for key in keys
    )


def of_tree(tree: Any) -> dict[str, int]:
    """Returns {path: the sum of a leaf's words, each as wide as its dtype}."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    local = [sum(map(_sum_of_words, _shards(leaf))) % 2**64 for _, leaf in leaves]
    total = processes.all_sum(np.asarray(local, np.uint64)) % 2**53  # exact in any JSON
    paths = (tree_path(keys) for keys, _ in leaves)
    return dict(zip(paths, map(int, total), strict=True))


def of_json(value: Any) -> int:
    """Returns the CRC-32 of a value's JSON."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def check(expected: dict[str, int], tree: Any) -> None:
    """Raises ValueError naming the first leaf whose checksum is not as expected."""
    for path, checksum in of_tree(tree).items():
        if expected.get(path) != checksum:
            raise ValueError(f"{path} is not as it was written")


def non_finite(tree: Any) -> list[str]:
    """Returns the paths of the leaves that contain a NaN or an infinity."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    local = [not all(map(_is_finite, _shards(leaf))) for _, leaf in leaves]
    total = processes.all_sum(np.asarray(local, np.uint64))
    return [tree_path(keys) for (keys, _), n in zip(leaves, total, strict=True) if n]


def _shards(leaf: Any) -> list[np.ndarray]:
    """Returns the shards of an array that this process counts, each once."""
    if not isinstance(leaf, jax.Array):
        return [np.asarray(leaf)]
    shards = leaf.addressable_shards
    return [np.asarray(shard.data) for shard in shards if shard.replica_id == 0]


def _sum_of_words(shard: np.ndarray) -> int:
    width = min(shard.dtype.itemsize, 8)
    words = np.ascontiguousarray(shard).reshape(-1).view(f"u{width}")
    return int(np.sum(words, dtype=np.uint64))


def _is_finite(shard: np.ndarray) -> bool:
    return shard.dtype.kind in "iub" or bool(np.isfinite(shard).all())
