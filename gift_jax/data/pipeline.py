# SPDX-License-Identifier: Apache-2.0
"""Endless, seeded, resumable batches of arrays in memory, through Grain.

The order is drawn once for all processes: a global batch is a run of the shuffled
order, and process p reads slice p of it. So the examples of step n depend on the seed
alone, never on how many processes share the work.
"""

import functools

import jax
import numpy as np

from gift_jax.runtime.errors import UserError

INDEX = "index"  # the key that `batches` adds
_ENDLESS = 2**40  # batches


class DeduplicatedArray:
    """An array "N ..." of few distinct entries, each of them in memory once.

    Args: table: the distinct entries, a pytree of arrays "U ...". rows: int "N", which
      one entry i is. own: {name: array "N ..."}, of each entry beside what the table
      has, a dict then.
    """

    def __init__(self, table, rows, own=None):
        self.table, self.rows, self.own = table, rows, own or {}

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, positions):
        rows = self.rows[positions]
        entries = jax.tree.map(lambda array: array[rows], self.table)
        if not self.own:
            return entries
        return entries | {name: array[positions] for name, array in self.own.items()}


class ArraySource:
    """A dict of arrays of one length, read by row or by many rows at once.

    Attributes: arrays: dict of NumPy arrays or `DeduplicatedArray`s, "N ...".
    """

    def __init__(self, arrays):
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"arrays must have one length each, not {lengths}")
        if INDEX in arrays:
            raise ValueError(f"the name {INDEX!r} is taken by the pipeline")
        self.arrays = arrays
        self._length = next(iter(lengths.values()))

    def __len__(self):
        return self._length

    def __getitem__(self, position):
        return {name: array[position] for name, array in self.arrays.items()}

    def take(self, positions):
        """Returns a batch: the rows at int "B" `positions`, copied."""
        return {name: a[positions] for name, a in self.arrays.items()}


def batches(
    source,
    batch_size,
    seed,
    *,
    process_index=0,
    process_count=1,
    drop_remainder=True,
):
    """Returns an endless iterator of this process's part of each global batch.

    Args: source: an `ArraySource`. batch_size: of the global batch. seed: fixes the
        order of every epoch, a new one each.
      drop_remainder: True ends an epoch where no whole batch is left (a different
        remainder is left out each time); False lets epochs run into each other.
        Batches have one size either way, so that a step compiles once.
    Returns: a Grain iterator of dicts "B/process_count ...", each with `index`, int32:
      an example's place in the global batch. `get_state()` returns a small dict that
      JSON can hold; `set_state()` continues from it, under any process_count.
    Raises: UserError if the source is empty, the batch does not divide by the
      processes, or no whole batch fits in an epoch.
    """
    import grain  # takes a quarter of what --help would wait for

    size = len(source)
    _check(size, batch_size, process_count, drop_remainder)
    epoch_size = size - size % batch_size if drop_remainder else size
    local = batch_size // process_count
    places = np.arange(process_index * local, (process_index + 1) * local)

    # Grain's own shuffle takes 0.4 ms for an example, a tenth of a small step.
    @functools.lru_cache(maxsize=2)
    def order(epoch):
        return np.random.default_rng((int(seed), epoch)).permutation(size)

    def read(number):
        epochs, within = np.divmod(number * batch_size + places, epoch_size)
        rows = [order(e)[i] for e, i in zip(epochs.tolist(), within, strict=True)]
        return source.take(np.asarray(rows)) | {INDEX: places.astype(np.int32)}

    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=2)
    numbers = grain.MapDataset.range(_ENDLESS).map(read)
    return iter(numbers.to_iter_dataset(options))


def _check(size, batch_size, process_count, drop_remainder):
    if size == 0:
        raise UserError("the data has no examples; check its names and its folder")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1")
    if batch_size % process_count:
        fix = process_count * max(1, batch_size // process_count)
        raise UserError(
            f"batch_size={batch_size} must divide by {process_count} processes; "
            f"try batch_size={fix}"
        )
    if drop_remainder and batch_size > size:
        raise UserError(
            f"batch_size={batch_size} is larger than the data ({size} examples); "
            f"try batch_size={size}"
        )
