# SPDX-License-Identifier: Apache-2.0
"""The largest batch that fits into a chip's memory."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

GB = 1e9


class DoesNotFit(Exception):
    """The program needs more memory than the chip has.

    Attributes: used: bytes, as far as the compiler says (of temporaries alone, where
      it gives up early), or inf.
    """

    def __init__(self, used: float):
        size = f"{used / GB:.1f} GB" if math.isfinite(used) else "more than there is"
        super().__init__(f"needs {size} of a chip")
        self.used = used


def fit(attempt: Callable[[int], dict], low: int = 1, limit: int = 4096) -> dict:
    """Returns the report of the largest batch a chip that fits.

    Memory grows nearly linearly with the batch: a line through what is known says
    where it may be full, until one batch fits and the next does not.

    Args: attempt: batch -> report, or DoesNotFit. low: the first to try.
    Raises: DoesNotFit if not even one does.
    """
    reports: dict[int, dict[str, Any]] = {}
    sizes: dict[int, float] = {}  # bytes by batch
    batches, batch, ceiling = set(), low, limit + 1
    while True:
        batches.add(batch)
        try:
            reports[batch] = attempt(batch)
            sizes[batch] = reports[batch]["hbm_bytes"]["used"]
        except DoesNotFit as error:
            if batch == 1:
                raise
            ceiling = batch
            if math.isfinite(error.used):
                sizes[batch] = error.used
        best = max(reports, default=0)
        if ceiling == best + 1:
            return reports[best] | {"tried": sorted(batches)}
        guess = _guess(reports, sizes) if best else ceiling // 2
        batch = int(np.clip(guess, best + 1, ceiling - 1))


def _guess(reports, sizes) -> float:
    """Returns the batch at which memory is full."""
    memory = reports[max(reports)]["hbm_bytes"]
    *_, a, b = sorted({0, *sizes})
    # one size alone: as if its temporaries were in proportion to the batch
    known = sizes | ({0: sizes[b] - memory["temporaries"]} if not a else {})
    slope = (known[b] - known[a]) / (b - a)
    return b + (memory["capacity"] - sizes[b]) / max(1.0, slope)
