# SPDX-License-Identifier: Apache-2.0
"""Two real processes of two devices each, over gloo; and their configuration."""

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


# The loop's small quadratic, on the devices of all processes.
LOOP = """
import pathlib, sys
sys.path[:0] = [{tests!r}, {tests!r} + "/training"]
from ml_collections import ConfigDict
from gift_jax.runtime import cli, processes

def main():
    coordinator, index = sys.argv[1], int(sys.argv[2])
    group = dict(coordinator=coordinator, count=2, index=index)
    processes.connect(ConfigDict(group))
    import test_loop  # uses JAX

    test_loop.run(pathlib.Path(sys.argv[3]), 100_000, devices=2, log_every=100)
    return 0

cli.run_main(main)
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), 8, 3)


@pytest.fixture
def popen():
    """(command, environment) -> a started process, killed in the end."""
    started = []

    def popen(command, **env):
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONFAULTHANDLER": "1"} | env
        pipe = {"stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, env=env, **pipe)
        started.append(process)
        return process

    yield popen
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def train(popen, tiny_folder, pictures, pytestconfig):
    """(workdir, steps, processes) -> the started processes of a training run."""

    def train(workdir, steps, count):
        argv = [sys.executable, "-m", "gift_jax.train", f"--workdir={workdir}"]
        argv += ["--config=configs/emoji_baselines.py:maximize_smoke"]
        argv += [f"--config.steps={steps}", "--config.upper.warmup_frac=0"]
        argv += ["--config.upper.schedule=constant"]  # does not depend on the steps
        argv += [f"--config.model={tiny_folder}", "--config.samples.num=0"]
        argv += ["--config.verify=off"]
        argv += ["--config.harmful.names=()", "--config.harmful.prompt=a picture"]
        argv += [f"--config.harmful.folder={pictures}"]
        argv += ["--config.checkpoints.every=2"]
        argv += [f"--config.hardware.cpu_devices={4 // count}"]
        cache = str(pytestconfig.cache.mkdir("hosts"))
        env = {"GIFT_JAX_CACHE": cache, "XLA_FLAGS": quick_compile.flags()}
        group = {"coordinator": free_address(), "count": count}
        if count == 1:
            return [popen(argv, **env)]
        argv += [f"--config.hardware.processes.{name}={group[name]}" for name in group]
        indices = (
            f"--config.hardware.processes.index={index}" for index in range(count)
        )
        return [popen([*argv, index], **env) for index in indices]

    return train


@pytest.fixture
def loops(popen, tmp_path):
    """Two processes that take the same steps, the second checkpoint written."""
    script = LOOP.format(tests=str(ROOT / "tests"))
    address, run = free_address(), tmp_path / "run"
    both = [
        popen([sys.executable, "-c", script, address, str(index), run], XLA_FLAGS="")
        for index in range(2)
    ]
    wait_for(run / "checkpoints" / "2", both)
    return both


def free_address():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{server.getsockname()[1]}"


def ended(processes, within=TOGETHER_S):
    """Returns (exit codes, what each wrote to stderr); of a hang, the tracebacks."""
    try:
        errors = [process.communicate(timeout=within)[1] for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.send_signal(signal.SIGSEGV)  # PYTHONFAULTHANDLER writes tracebacks
        errors = [process.communicate(timeout=60)[1] for process in processes]
        pytest.fail(f"not ended in {within} s\n" + "\n--- next\n".join(errors))
    return [process.returncode for process in processes], errors


def wait_for(path, processes):
    for _ in range(10 * TOGETHER_S):
        if path.exists():
            return
        if any(process.poll() is not None for process in processes):
            pytest.fail(f"ended early: {ended(processes)}")
        time.sleep(0.1)
    pytest.fail(f"{path} did not come")


def tensors(run):
    folder = run / "export" / "unet"
    return safetensors.numpy.load_file(folder / "diffusion_pytorch_model.safetensors")


def logged(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on(train, tmp_path, tiny_folder):
    both = train(tmp_path / "run", 4000, 2)
    wait_for(tmp_path / "run" / "checkpoints" / "2", both)
    both[1].send_signal(signal.SIGTERM)
    codes, errors = ended(both)
    assert codes == [143, 143], errors
    assert "first step took" in errors[0] and "first step took" not in errors[1]
    stopped = max(
        int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*")
    )
    assert 2 <= stopped < 4000 and not (tmp_path / "run" / "export").exists()
    steps = stopped + 2
    for run in ("run", "straight"):
        codes, errors = ended(train(tmp_path / run, steps, 1))
        assert codes == [0], errors
    assert [line["step"] for line in logged(tmp_path / "run")] == [
        line["step"] for line in logged(tmp_path / "straight")
    ]
    base = safetensors.numpy.load_file(
        tiny_folder / "unet" / "diffusion_pytorch_model.safetensors"
    )
    one, two = tensors(tmp_path / "straight"), tensors(tmp_path / "run")
    assert any((base[name] != one[name]).any() for name in base)
    for name in base:
        change = np.abs(one[name] - base[name]).max()
        assert np.abs(two[name] - one[name]).max() <= 1e-2 * change, name


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_process_ends_within_a_minute_of_a_peers_death(loops, victim):
    loops[victim].kill()
    (code,), (error,) = ended([loops[1 - victim]], within=60)
    assert code == processes.EXIT_PEER_DIED, error
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: another process of this run has died")


def test_sigint_to_one_process_stops_both_after_the_same_step(loops):
    loops[1].send_signal(signal.SIGINT)
    codes, errors = ended(loops)
    assert codes == [143, 130], errors
    assert all("after a checkpoint" in error for error in errors)


@pytest.mark.parametrize(
    "group, message",
    [
        (("h:1", 2, -1), "needs all of coordinator, count and index"),
        (("", 2, 0), "needs all of coordinator, count and index"),
        (("h:1", 2, 2), "config.hardware.processes.index=2 must be below count=2"),
    ],
)
def test_processes_set_in_part_are_refused(group, message):
    fields = dict(zip(("coordinator", "count", "index"), group, strict=True))
    with pytest.raises(UserError, match=message):
        processes.check(ConfigDict(fields))


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
def test_environment_names_several_processes(monkeypatch, variables, several):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    unset = ConfigDict({"coordinator": "", "count": 0, "index": -1})
    assert processes.are_several(unset) == several
