# SPDX-License-Identifier: Apache-2.0
"""Commands killed at random moments and run again end as if nothing had happened.

    GIFT_JAX_KILLS=50 python -m pytest -m slow -s tests/stress -k train-KILL

An undisturbed run comes first. Then the same command is ended by a signal at a moment
drawn from its whole duration, looked at, and started again, until it has been ended so
often; a run that finishes before is compared and begun anew. Every time:

  after a signal  every JSON file and every line of metrics.jsonl can be read, and an
                  export, where there is one, loads and is the undisturbed run's
  at the end      trained parameters, export and metrics are the undisturbed run's, bit
                  for bit (seconds aside)

SIGTERM must end a command with exit code 143 (as a shell has it).
"""

import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from gift_jax.models import weights
from gift_jax.training import checkpoint, checksums

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("GIFT_JAX_KILLS", "8"))
ROOT = pathlib.Path(__file__).resolve().parents[2]
QUICK = ["--config.steps=12", "--config.log_every=1", "--config.verify=off"]
QUICK += ["--config.checkpoints.every=3", "--config.checkpoints.keep=2"]
FLAGS = {
    "train": ["--config=configs/emoji_gift.py:smoke", *QUICK],
    "attack": ["--config=configs/emoji_attack.py:smoke", *QUICK],
    "benchmark": ["--config=configs/emoji_benchmark.py:smoke"],
}
TIMES = ("seconds", "step_s", "defense_seconds", "defense_step_s", "command")


def start(command, workdir, log):
    argv = [sys.executable, "-m", f"gift_jax.{command}", f"--workdir={workdir}"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with open(log, "w") as file:
        return subprocess.Popen(
            [*argv, *FLAGS[command]], cwd=ROOT, env=env, stdout=file, stderr=file
        )


def finish(command, workdir):
    """Returns (what an undisturbed run ends with, its seconds)."""
    began, log = time.perf_counter(), workdir.with_suffix(".log")
    assert start(command, workdir, log).wait() == 0, log.read_text()[-2000:]
    return contents(workdir), time.perf_counter() - began


def contents(workdir):
    """Returns {file: content, as far as it is not a matter of time}."""
    result = {}
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if path.name == "metrics.jsonl":
            result[name] = [timeless(line) for line in read_lines(path)]
        elif path.name in ("results.json", "cell.json"):
            result[name] = timeless(json.loads(path.read_text()))
        elif path.name == "export":
            result[name] = weights.content_hash(path)
        elif path.suffix in (".safetensors", ".png"):
            result[name] = sha256(path)
        elif path.name == "checkpoints" and path.is_dir():
            step, params = checkpoint.read_params(path)
            result[f"{name}/{step}"] = checksums.of_tree(params)
    return result


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(value):
    if isinstance(value, dict):
        return {
            key: timeless(item)
            for key, item in value.items()
            if not (key.startswith("time/") or key in TIMES)
        }
    return [timeless(item) for item in value] if isinstance(value, list) else value


def check_after_signal(workdir, expected):
    """Asserts that nothing half-written has its final name."""
    for path in workdir.rglob("*"):
        name = str(path.relative_to(workdir))
        if any(part.startswith(".") or "checkpoints" in part for part in path.parts):
            continue  # Orbax's own; what is in them is compared at the end
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.name == "metrics.jsonl":
            read_lines(path)
        elif path.name == "export":
            assert weights.content_hash(path) == expected[name]
        elif path.suffix == ".png":
            assert sha256(path) == expected[name]


def end(process, signum, workdir, log):
    """Sends the signal and asserts that the process ends by it, unless it was done."""
    is_over = any((workdir / name).exists() for name in ("export", "results.json"))
    process.send_signal(signum)
    code = process.wait()
    # before the command has begun, and after its end, Python's own handler is there
    allowed = {-signum, 128 + signum} | ({0} if is_over else set())
    assert code in allowed, (code, log.read_text()[-2000:])


@pytest.mark.parametrize("name", ["KILL", "TERM"])
@pytest.mark.parametrize("command", FLAGS)
def test_a_command_ended_anywhere_resumes(command, name, tmp_path, monkeypatch):
    monkeypatch.setenv("GIFT_JAX_CACHE", str(tmp_path / "cache"))
    signum, draw = signal.Signals[f"SIG{name}"], random.Random(0)
    first, _ = finish(command, tmp_path / "compiles")
    expected, seconds = finish(command, tmp_path / "straight")
    assert expected and first == expected
    workdir, log = tmp_path / "killed", tmp_path / "killed.log"
    kills = 0
    while kills < KILLS or workdir.exists():
        process = start(command, workdir, log)
        moment = draw.uniform(0, 1.05 * seconds) if kills < KILLS else None
        try:
            code = process.wait(moment)
        except subprocess.TimeoutExpired:
            kills += 1
            end(process, signum, workdir, log)
            check_after_signal(workdir, expected)
            print(f"{kills} of {KILLS}", flush=True)
            continue
        assert code == 0, log.read_text()[-2000:]
        assert contents(workdir) == expected
        shutil.rmtree(workdir)
