# SPDX-License-Identifier: Apache-2.0
"""The C library's heap, from which XLA takes the memory of every step on CPUs.

Where the library is not glibc nothing is done.
"""

import ctypes
import os
import time

OPTIONS = (  # of malloc.h
    (-8, 1),  # M_ARENA_MAX: one heap for all threads, as others hold 64 MB at most
    (-4, 0),  # M_MMAP_MAX: no block with a mapping of its own
    (-1, -1),  # M_TRIM_THRESHOLD: never shrink the heap,
    (-2, 2**27),  # M_TOP_PAD: and let it grow by 128 MB at a time
)
_LARGEST, _SMALLEST = 2**26, 2**12  # of what gaps are filled with, bytes
_FREED_S = 0.1  # seconds; a step frees its own within 0.001 of its results
_filling: list[int] = []  # addresses


class _Info(ctypes.Structure):
    """What mallinfo2 tells, in bytes; of malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def retain_freed_memory() -> None:
    """Has the heap keep the memory that a step frees, for the next step.

    As it comes, glibc gives blocks of that size back to the system, which clears each
    page that it hands out again: a third of a step's time. Before a second thread takes
    memory: a heap of its own stays for others too, and has no room for such blocks.
    """
    if library := _library("mallopt"):
        for option, value in OPTIONS:
            library.mallopt(option, value)


def close_gaps() -> None:
    """Leaves one piece of the heap for the steps that follow; what was free is closed.

    What compiling leaves is a hundred thousand gaps, and malloc looks through them for
    every buffer of every step: a fifth of the steps' time. Their pages go back to the
    system; what fills them is freed at the next call. Waits for a tenth of a second: if
    a step's largest block were freed meanwhile, what fills gaps would go there, and the
    next step need as much again.
    """
    library = _library("mallinfo2", "malloc_trim")  # glibc 2.33
    if library is None or not OPTIONS:
        return
    library.mallinfo2.restype = _Info
    time.sleep(_FREED_S)
    while _filling:
        library.free(_filling.pop())
    library.malloc_trim(0)
    told = library.mallinfo2()
    end = library.sbrk(0) - told.keepcost  # above it, all is one piece
    left, size = told.fordblks - told.keepcost, _LARGEST
    while size >= _SMALLEST and left > 0:
        block = library.malloc(size)
        if block is None:
            break
        if block < end:
            _filling.append(block)
            left -= size
        else:
            library.free(block)
            size = size * 3 // 4


def _library(*names: str):
    """Returns the C library, or None if it lacks any of those functions of glibc."""
    if os.name != "posix":
        return None
    library = ctypes.CDLL(None)
    if not all(hasattr(library, name) for name in names):
        return None
    library.malloc.restype = library.sbrk.restype = ctypes.c_void_p
    library.malloc.argtypes = [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.sbrk.argtypes = [ctypes.c_ssize_t]
    return library
