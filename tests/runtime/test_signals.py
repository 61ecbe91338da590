# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGINT end a process, or are noted while a loop takes steps."""

import os
import signal
import subprocess
import sys
import time

import pytest

from gift_jax.runtime import signals
from gift_jax.runtime.errors import StoppedBySignal

SCRIPT = """
import time
from gift_jax.runtime import cli, signals

class Callback:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(1)

def main():
{work}
    return 0

cli.run_main(main)
"""
SLEEP = """
    print("ready", flush=True)
    time.sleep(60)
"""
SWALLOWED = """
    with signals.flag.in_loop() as flag:
        Callback()  # its exceptions are printed and ignored
        flag.deferred = True
        while flag.signum is None:  # what the loop asks after each step
            time.sleep(0.01)
"""


def end(signum, work):
    """Returns (exit code, seconds until then, output) of a process after a signal."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(work=work)],
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
def test_signal_outside_the_loop_ends_the_process(signum, code):
    exit_code, seconds, output = end(signum, SLEEP)
    assert exit_code == code and seconds < 30
    message = f"stopped by signal {signum:d}; run the same command to go on\n"
    assert output == message


def test_signal_that_a_callback_swallows_is_noticed_after_the_step():
    code, seconds, output = end(signal.SIGTERM, SWALLOWED)
    assert "Exception ignored in" in output  # or nothing was swallowed
    assert code == 143 and seconds < 30
    assert "stopped by signal 15 after a checkpoint" in output


def test_first_signal_is_deferred_and_the_second_raises():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedBySignal, match="signal 15$") as stopped:
        with signals.flag.in_loop() as flag:
            flag.deferred = True
            os.kill(os.getpid(), signal.SIGTERM)
            assert flag.signum == signal.SIGTERM
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert stopped.value.exit_code == 143
    assert signals.flag.signum is None
    assert signal.getsignal(signal.SIGTERM) == before


def test_signal_before_the_first_step_raises():
    with pytest.raises(StoppedBySignal, match="signal 2$"), signals.flag.in_loop():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_sigint_to_one_of_several_processes_becomes_sigterm():
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(signal.SIGTERM))
    try:
        with pytest.raises(StoppedBySignal, match="signal 2 after a checkpoint"):
            with signals.flag.in_loop(several=True) as flag:
                flag.deferred = True
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
