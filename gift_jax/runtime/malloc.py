# SPDX-License-Identifier: Apache-2.0
"""Settings of glibc's malloc, from which XLA takes the memory of every CPU step."""

import ctypes
import platform

OPTIONS = (  # of malloc.h
    (-8, 1),  # M_ARENA_MAX: one heap for all threads; other arenas hold at most 64 MB
    (-4, 0),  # M_MMAP_MAX: no block with a mapping of its own
    (-1, -1),  # M_TRIM_THRESHOLD: never shrink the heap,
    (-2, 2**27),  # M_TOP_PAD: and let it grow by 128 MB at a time
)


def retain_freed_memory() -> None:
    """Lets the heap keep the memory that a step frees, for the next step.

    By default glibc returns large blocks to the kernel, which clears every page that it
    hands out again: a third of a step's time. Call this before there are threads. Does
    nothing where the C library is not glibc.
    """
    if platform.libc_ver()[0] == "glibc":
        for option, value in OPTIONS:
            ctypes.CDLL(None).mallopt(option, value)
