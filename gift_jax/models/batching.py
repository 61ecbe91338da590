# SPDX-License-Identifier: Apache-2.0
"""A function over many rows, some at a time, all batches of one size."""

from collections.abc import Callable
from typing import Any

import jax
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
