# SPDX-License-Identifier: Apache-2.0
"""A run on a small disk that fills up, is made larger, and is then read-only.

In a mount namespace of its own, where the system lets users create one.
"""

import os
import pathlib
import subprocess
import sys

import pytest

import gift_jax

TESTS = pathlib.Path(__file__).parents[1]
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-ec")
MOUNT = "mount -t tmpfs -o size={size} tmpfs {folder}"
JOB = """
import pathlib, sys
sys.path[:0] = [{tests!r}, {tests!r} + "/training"]
import test_loop
from gift_jax.runtime import cli

def main():
    workdir = pathlib.Path(sys.argv[1]) / "run"
    state = test_loop.run(workdir, int(sys.argv[2]), checkpoint_every=10)
    print("done", int(state.step), flush=True)
    return 0

cli.run_main(main)
"""


def in_namespace(script):
    """Returns the output of a shell script that may mount; None if that is denied."""
    try:
        if subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
            return None
    except FileNotFoundError:
        return None
    env = os.environ | {"PYTHONPATH": str(pathlib.Path(gift_jax.__file__).parents[1])}
    command = [*NAMESPACE, script]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The output of a run on a full disk, on a larger and on a read-only one."""
    folder = tmp_path_factory.mktemp("disk")
    job = tmp_path_factory.mktemp("job") / "job.py"
    job.write_text(JOB.format(tests=str(TESTS)))
    run = f"{sys.executable} {job} {folder}"
    mount = MOUNT.format(size="150k", folder=folder)
    output = in_namespace(
        f"{mount}; exec 2>&1\n"
        f"{run} 120 || echo code $?\n"
        f"echo ---; mount -o remount,size=50m {folder}\n"
        f"{run} 120 || echo code $?\n"
        f"echo ---; mount -o remount,ro {folder}\n"
        f"{run} 121 || echo code $?\n"
    )
    if output is None:
        pytest.skip("this system does not let users mount a disk")
    return output.split("---\n")


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_full_disk_is_one_line(outputs):
    full = outputs[0]
    assert "code 2" in full and "done" not in full and "Traceback" not in full
    (line,) = errors(full)
    assert "cannot be written (No space left on device); make room" in line


def test_run_goes_on_when_there_is_room(outputs):
    more = outputs[1]
    assert "restored step" in more and "done 120" in more and not errors(more)


def test_disk_that_cannot_be_written_is_one_line(outputs):
    locked = outputs[2]
    assert "code 2" in locked and "done" not in locked and "Traceback" not in locked
    (line,) = errors(locked)
    assert "cannot be written (Read-only file system)" in line
