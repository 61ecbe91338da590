# SPDX-License-Identifier: Apache-2.0
"""Two real processes of two devices each, over gloo; and what they are told."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import quick_compile
import safetensors.numpy
from ml_collections import ConfigDict
from tiny_model import write_pictures

import gift_jax
from gift_jax.runtime import processes
from gift_jax.runtime.errors import UserError

ROOT = pathlib.Path(gift_jax.__file__).parents[1]
TOGETHER_S = 240  # for two processes to start and compile on a busy machine


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 8, 3)


@pytest.fixture
def start(tiny_folder, pictures, pytestconfig):
    """(workdir, steps, processes, flags) -> the started processes."""
    started = []

    def start(workdir, steps, count, *flags):
        argv = [sys.executable, "-m", "gift_jax.train", f"--workdir={workdir}"]
        argv += ["--config=configs/emoji_gift.py:smoke", f"--config.steps={steps}"]
        argv += [f"--config.model={tiny_folder}", "--config.samples.num=0"]
        for group in ("harmful", "safe"):
            argv += [f"--config.{group}.names=()", f"--config.{group}.prompt=a {group}"]
            argv += [f"--config.{group}.folder={pictures}"]
        argv += ["--config.checkpoint_every=2", f"--config.cpu_devices={4 // count}"]
        for level in ("lower", "upper"):  # a rate that does not hang on the steps
            argv += [f"--config.{level}.warmup_frac=0"]
            argv += [f"--config.{level}.schedule=constant"]
        argv += flags
        cache = pytestconfig.cache.mkdir("hosts")
        env = os.environ | {"GIFT_JAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
        env |= {"XLA_FLAGS": quick_compile.flags(), "PYTHONFAULTHANDLER": "1"}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mine = []
        for index in range(count):
            group = {"coordinator": f"127.0.0.1:{port}", "count": count, "index": index}
            told = [f"--config.processes.{name}={group[name]}" for name in group]
            mine.append(
                subprocess.Popen(
                    argv + (told if count > 1 else []),
                    cwd=ROOT,
                    env=env,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        started.extend(mine)
        return mine

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ended(processes, within=TOGETHER_S):
    """Returns (exit codes, what each wrote to stderr); of a hang, where they stand."""
    try:
        said = [process.communicate(timeout=within)[1] for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            for child in _children(process):
                os.kill(child, signal.SIGABRT)  # which PYTHONFAULTHANDLER answers
        said = [process.communicate(timeout=60)[1] for process in processes]
        pytest.fail(f"not ended in {within} s\n" + "\n--- next\n".join(said))
    return [process.returncode for process in processes], said


def _children(process):
    """Returns a process's children's ids; of Linux, elsewhere none."""
    told = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in told.read_text().split()] if told.exists() else []


def wait_for(path, processes):
    for _ in range(10 * TOGETHER_S):
        if path.exists():
            return
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    pytest.fail(f"{path} did not come")


def tensors(run):
    folder = run / "export" / "unet"
    return safetensors.numpy.load_file(folder / "diffusion_pytorch_model.safetensors")


def logged(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_two_processes_stop_together_and_one_goes_on(start, tmp_path, tiny_folder):
    both = start(tmp_path / "run", 4000, 2)
    wait_for(tmp_path / "run" / "checkpoints" / "2", both)
    both[1].send_signal(signal.SIGTERM)
    codes, said = ended(both)
    assert codes == [143, 143], said
    assert "immunize: first step" in said[0] and "first step" not in said[1]
    stopped = max(
        int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*")
    )
    assert 2 <= stopped < 4000 and not (tmp_path / "run" / "export").exists()
    steps = stopped + 2
    for run in ("run", "straight"):
        codes, said = ended(start(tmp_path / run, steps, 1))
        assert codes == [0], said
    assert [line["step"] for line in logged(tmp_path / "run")] == [
        line["step"] for line in logged(tmp_path / "straight")
    ]
    base = safetensors.numpy.load_file(
        tiny_folder / "unet" / "diffusion_pytorch_model.safetensors"
    )
    one, two = tensors(tmp_path / "straight"), tensors(tmp_path / "run")
    moved = [name for name in base if (base[name] != one[name]).any()]
    assert moved
    for name in base:
        change = np.abs(one[name] - base[name]).max()
        assert np.abs(two[name] - one[name]).max() <= 1e-2 * change, name


@pytest.mark.parametrize("dies", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_dead_process_is_told_of_within_a_minute(start, tmp_path, dies):
    both = start(tmp_path / "run", 4000, 2)
    wait_for(tmp_path / "run" / "checkpoints" / "2", both)
    both[dies].kill()
    began = time.monotonic()
    (code,), (said,) = ended([both[1 - dies]], within=60)
    assert time.monotonic() - began < 60
    assert code == processes.EXIT_PEER_DIED
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: another process of this run has died")


@pytest.mark.parametrize(
    "group, message",
    [
        (("h:1", 2, -1), "needs all of coordinator, count and index"),
        (("", 2, 0), "needs all of coordinator, count and index"),
        (("h:1", 2, 2), "config.processes.index=2 must be below count=2"),
    ],
)
def test_half_named_processes_are_refused(group, message):
    named = dict(zip(("coordinator", "count", "index"), group, strict=True))
    with pytest.raises(UserError, match=message):
        processes.check(ConfigDict(named))


@pytest.mark.parametrize(
    "variables, several",
    [
        ({}, False),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_environment_tells_of_others(monkeypatch, variables, several):
    for name in processes._SEVERAL:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes._launched_by_cluster() == several
