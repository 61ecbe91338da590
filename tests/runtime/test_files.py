# SPDX-License-Identifier: Apache-2.0
"""Files and folders are whole or not there; one process writes to a folder."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from gift_jax.runtime import files
from gift_jax.runtime.errors import UserError
from gift_jax.runtime.workdir import lock


class Stop(Exception):
    pass


def test_json_is_written_whole(tmp_path):
    path = tmp_path / "sub" / "a.json"
    files.write_json(path, {"b": 1, "a": [1, 2]})
    files.write_json(path, {"b": 2})
    assert json.loads(path.read_text()) == {"b": 2}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_file_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.png"
    files.write(path, b"old")
    with pytest.raises(Stop), files.atomic_write(path) as aside:
        assert aside.suffix == ".png"
        aside.write_bytes(b"half")
        raise Stop
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    out = tmp_path / "model"
    with files.atomic_folder(out) as temp:
        (temp / "sub").mkdir()
        (temp / "sub" / "a").write_text("old")
    with pytest.raises(Stop), files.atomic_folder(out) as temp:
        (temp / "b").write_text("new")
        raise Stop
    assert [p.name for p in out.rglob("*")] == ["sub", "a"]
    with files.atomic_folder(out) as temp:
        (temp / "b").write_text("new")
    assert [p.name for p in out.rglob("*")] == ["b"]
    assert list(tmp_path.iterdir()) == [out]


KILLED = """
import os, pathlib, signal, sys
from gift_jax.runtime import files
path = pathlib.Path(sys.argv[1])
if sys.argv[2] == "file":
    with files.atomic_write(path) as aside:
        aside.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
elif sys.argv[2] == "folder":
    with files.atomic_folder(path) as temp:
        (temp / "half").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
else:  # between the two renames
    shutil = files.shutil
    rename = pathlib.Path.rename
    def killed(self, target):
        rename(self, target)
        os.kill(os.getpid(), signal.SIGKILL)
    pathlib.Path.rename = killed
    with files.atomic_folder(path) as temp:
        (temp / "new").write_text("new")
"""


def kill(path, moment):
    command = [sys.executable, "-c", KILLED, str(path), moment]
    assert subprocess.run(command).returncode == -signal.SIGKILL


@pytest.mark.parametrize("name", ["a.json", "noending"])
def test_file_of_a_killed_process_is_removed_by_the_next_write(tmp_path, name):
    path, other = tmp_path / name, tmp_path / f".{name}.of-somebody"
    other.write_text("kept")
    kill(path, "file")
    assert not path.exists() and len(list(tmp_path.iterdir())) == 2
    files.write(path, "whole")
    assert sorted(tmp_path.iterdir()) == sorted([path, other])


def test_folder_of_a_killed_process_is_removed_by_the_next_write(tmp_path):
    out = tmp_path / "model"
    kill(out, "folder")
    assert not out.exists() and len(list(tmp_path.iterdir())) == 1
    with files.atomic_folder(out) as temp:
        (temp / "a").write_text("a")
    assert list(tmp_path.iterdir()) == [out]


def test_folder_set_aside_comes_back_when_the_new_one_fails(tmp_path):
    out = tmp_path / "model"
    with files.atomic_folder(out) as temp:
        (temp / "a").write_text("old")
    kill(out, "renames")
    assert not out.exists()
    with pytest.raises(Stop), files.atomic_folder(out):
        raise Stop
    assert (out / "a").read_text() == "old"


def test_files_of_a_living_process_and_of_another_host_stay(tmp_path):
    with files.atomic_write(tmp_path / "a.json") as aside:
        aside.write_text("half")
        tag = f"-{os.getpid()}"
        living = aside.with_name(aside.name.replace(tag, f"-{os.getppid()}"))
        elsewhere = aside.with_name(aside.name.replace(tag, "-elsewhere-1"))
        assert len({aside, living, elsewhere}) == 3
    for path in (living, elsewhere):
        path.write_text("half")
    files.write(tmp_path / "a.json", "{}")
    assert living.exists() and elsewhere.exists()


def limited(limit):
    """Lets this process write files of so many bytes at most."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


def test_line_that_does_not_fit_leaves_nothing_of_itself(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = files.AppendOnlyFile(path, keep=bool)
    lines.add("a" * 500)
    try:
        limited(700)
        with pytest.raises(OSError):
            lines.add("b" * 500)
        assert path.read_text() == "a" * 500 + "\n"
        lines.add("c" * 100)
    finally:
        limited(resource.RLIM_INFINITY)
    lines.close()
    assert path.read_text() == "a" * 500 + "\n" + "c" * 100 + "\n"
    again = files.AppendOnlyFile(path, keep=lambda line: "a" in line)
    again.close()
    assert path.read_text() == "a" * 500 + "\n"


LOCKS = """
import pathlib, sys
from gift_jax.runtime import workdir
workdir.lock(pathlib.Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_folder_has_one_writer_until_that_ends_however_it_ends(tmp_path):
    command = [sys.executable, "-c", LOCKS, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="run is in use by another process"):
            lock(tmp_path / "run")
        lock(tmp_path / "another")
        other.kill()
    lock(tmp_path / "run")
    lock(tmp_path / "run")  # a second run of the same process
    refused = subprocess.run(command, capture_output=True, text=True, input="")
    assert "in use by another process" in refused.stderr
    lock(tmp_path / "another")  # gives the first one back
    done = subprocess.run(command, capture_output=True, text=True, input="")
    assert done.stdout == "locked\n", done.stderr
