# SPDX-License-Identifier: Apache-2.0
"""What the heap keeps, and that steps do not look through what compiling left there.

In processes of their own: glibc's settings stay for as long as a process lives.
"""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="settings of glibc"
)

FAULTS = """
import resource, sys, time
import jax, jax.numpy as jnp
from gift_jax.runtime import devices
if sys.argv[1] == "kept":
    devices.init_jax()
x = jnp.ones((2048, 2048))  # 16 MB
step = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))
for count in range(24):
    jax.block_until_ready(step(x))
    time.sleep(0.01)  # what a step has is freed just after its results
    if count == 11:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_memory_of_a_step_is_kept_for_the_next():
    faults = {}
    for how in ("as it comes", "kept"):
        command = [sys.executable, "-c", FAULTS, how]
        told = subprocess.run(command, capture_output=True, check=True, text=True)
        faults[how] = int(told.stdout)
    assert faults["as it comes"] > 10_000  # 4 kB each
    assert faults["kept"] < 0.3 * faults["as it comes"]  # JAX 0.8: up to 0.21


HEAPS = """
import ctypes, sys, threading
from gift_jax.runtime import cli
from gift_jax.runtime import devices
from gift_jax.runtime import malloc
if sys.argv[1] == "as it comes":
    malloc.OPTIONS = ()

def heaps():
    library = ctypes.CDLL(None)
    library.fopen.restype = ctypes.c_void_p
    library.fclose.argtypes = [ctypes.c_void_p]
    library.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
    file = library.fopen(b"heaps.xml", b"w")
    library.malloc_info(0, file)
    library.fclose(file)
    with open("heaps.xml") as told:
        return told.read().count("<heap ")

def main():
    devices.init_jax()
    threads = [threading.Thread(target=bytearray, args=(9999,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    print(heaps())
    return 0

cli.run_main(main)
"""


@pytest.mark.parametrize("how", ["as it comes", "kept"])
def test_a_commands_threads_have_one_heap(tmp_path, how):
    command = [sys.executable, "-c", HEAPS, how]
    told = subprocess.run(
        command, capture_output=True, check=True, text=True, cwd=tmp_path
    )
    assert int(told.stdout) == 1 if how == "kept" else int(told.stdout) > 1


GAPS = """
from gift_jax.runtime import malloc
malloc.retain_freed_memory()
library = malloc._library()
blocks = [library.malloc(2**13 + i % 999) for i in range(20_000)]
for block in blocks[::2]:
    library.free(block)

def in_a_gap():
    made = [library.malloc(2**12 + i) for i in range(99)]
    for block in made:
        library.free(block)
    return sum(block < max(blocks) for block in made)

before = in_a_gap()
malloc.close_gaps()
once = in_a_gap()
malloc.close_gaps()
filled = len(malloc._filling)
malloc.close_gaps()
print(before, once, filled, in_a_gap(), len(malloc._filling))
"""


LATE = """
import threading, time
from gift_jax.runtime import malloc
malloc.retain_freed_memory()
library = malloc._library()
large, above = library.malloc(2**28), library.malloc(2**12)

def free():
    time.sleep(0.01)
    library.free(large)

thread = threading.Thread(target=free)
thread.start()
malloc.close_gaps()
thread.join()
print(library.malloc(2**28) > above)
"""


def test_a_block_that_is_freed_just_after_a_step_is_closed_too():
    command = [sys.executable, "-c", LATE]
    told = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert told == "True\n"


def test_what_is_freed_among_the_rest_is_closed():
    command = [sys.executable, "-c", GAPS]
    told = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    before, once, filled, twice, refilled = map(int, told.split())
    assert before > 90
    assert max(once, twice) < 5
    assert 9_900 <= filled == refilled  # what had filled the gaps was freed
