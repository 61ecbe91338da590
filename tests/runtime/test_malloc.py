# SPDX-License-Identifier: Apache-2.0
"""The heap keeps the memory of a step, and all threads share one.

In processes of their own: glibc's settings stay for as long as a process lives.
"""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, threading, time
from gift_jax.runtime import malloc
if sys.argv[1] == "retained":
    malloc.retain_freed_memory()

def step():
    blocks = [bytearray(2**24) for _ in range(4)]  # 16 MB each, written to
    del blocks

for count in range(20):
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    if count == 9:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_memory_of_a_step_is_retained_for_the_next():
    faults = {}
    for setting in ("default", "retained"):
        command = [sys.executable, "-c", FAULTS, setting]
        done = subprocess.run(command, capture_output=True, check=True, text=True)
        faults[setting] = int(done.stdout)
    assert faults["default"] > 100_000  # pages of 4 kB, cleared in every step
    assert faults["retained"] < 0.1 * faults["default"]
