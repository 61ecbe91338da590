# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGINT end a process soon, wherever it is."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import gift_jax

ROOT = pathlib.Path(gift_jax.__file__).parents[1]
BUSY = "hashlib.pbkdf2_hmac('sha256', b'', b'', {n})"  # in C, without a look at signals
SCRIPT = """
import hashlib, time
from gift_jax.runtime import cli
from gift_jax.runtime import signals
signals.GRACE_S = 0.5

def main():
    signals.be_patient({patient})
    print("ready", flush=True)
    {work}
    time.sleep(0.1)
    return 0

cli.run_main(main)
"""


IN_A_LOOP = """with stopping.collected() as received:
        stopping.be_patient({patient})
        time.sleep({seconds})
        print("received", received)
    return 0"""

SWALLOWED = """class Callback:
        def __del__(self):
            time.sleep(1)
    Callback()
    stopping.be_patient({patient})
    time.sleep(60)"""


def end(signum, work, patient=False):
    """Returns (exit code, seconds until then, stderr) of one that gets a signal."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(work=work, patient=patient)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    began = time.monotonic()
    process.send_signal(signum)
    out, error = process.communicate()
    return process.returncode, time.monotonic() - began, out + error


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_python_code_is_stopped_at_once(signum, code):
    found, seconds, error = end(signum, "time.sleep(60)")
    assert found == code and seconds < 30 and "Traceback" not in error
    if signum == signal.SIGTERM:
        assert error == "stopped by signal 15; run the same command to go on\n"


def test_what_does_not_look_at_signals_is_ended_after_a_while():
    found, seconds, error = end(signal.SIGTERM, BUSY.format(n=2_000_000_000))
    assert found == 143 and 0.5 <= seconds < 30
    assert error == "stopped by signal 15; run the same command to go on\n"


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("patient", [False, True])  # as if steps began after it
def test_what_swallows_the_exception_is_ended_after_a_while(signum, code, patient):
    found, seconds, error = end(signum, SWALLOWED.format(patient=patient))
    assert "Exception ignored in" in error  # or nothing was swallowed
    assert found == code and seconds < 30
    assert error.endswith(
        f"stopped by signal {signum:d}; run the same command to go on\n"
    )


def test_a_step_is_waited_for():
    found, seconds, error = end(signal.SIGTERM, BUSY.format(n=8_000_000), patient=True)
    assert seconds > 1
    assert found == 143 and "stopped by signal 15" in error


def test_before_the_first_step_there_is_nothing_to_wait_for():
    found, seconds, said = end(
        signal.SIGTERM, IN_A_LOOP.format(patient=False, seconds=60)
    )
    assert found == 143 and seconds < 30
    assert said == "stopped by signal 15; run the same command to go on\n"


def test_while_steps_are_taken_a_signal_is_collected():
    found, _, said = end(signal.SIGTERM, IN_A_LOOP.format(patient=True, seconds=1))
    assert found == 0 and f"received [{int(signal.SIGTERM)}]" in said
