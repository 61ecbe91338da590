# SPDX-License-Identifier: Apache-2.0
"""A function over many rows, some at a time, all batches of one size."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def map_batches(fn: Callable[[Any], Any], arrays: Any, size: int) -> Any:
    """Returns fn(arrays), computed `size` rows at a time, so that it compiles once.

    The last batch is filled up with copies of the last row, whose results are dropped.

    Args:
      fn: (pytree of arrays "size ...") -> pytree of arrays "size ...".
      arrays: pytree of arrays "N ...", N >= 1. size: rows in a batch.
    Returns: pytree of NumPy arrays "N ...".
    Raises: ValueError if there are no rows.
    """
    count = len(jax.tree.leaves(arrays)[0])
    if not count:
        raise ValueError("map_batches needs at least one row")
    parts = []
    for first in range(0, count, size):
        rows = np.minimum(np.arange(first, first + size), count - 1)
        result = fn(jax.tree.map(lambda array, rows=rows: array[rows], arrays))
        parts.append(jax.tree.map(np.asarray, result))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays)[:count], *parts)


def map_powers_of_two(fn: Callable[[Any], Any], array: np.ndarray, most: int) -> Any:
    """Returns fn(array) of a jitted fn, computed `most` rows at a time.

    The last batch is filled up with zeros to the next power of two, so that few
    programs serve every number of rows.

    Args: fn: array "B ..." -> pytree of arrays "B ...". array: "N ...", N >= 1.
    """
    outputs = []
    for start in range(0, len(array), most):
        part = array[start : start + most]
        size = min(most, 1 << (len(part) - 1).bit_length())
        pad = [(0, size - len(part))] + [(0, 0)] * (array.ndim - 1)
        out, count = fn(np.pad(part, pad)), len(part)
        outputs.append(jax.tree.map(lambda a, count=count: a[:count], out))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
