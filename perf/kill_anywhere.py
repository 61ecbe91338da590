# SPDX-License-Identifier: Apache-2.0
"""Kills a command at random moments, runs it again, and compares the end.

    python perf/kill_anywhere.py --kills 50
    python perf/kill_anywhere.py --command attack --kills 20
    python perf/kill_anywhere.py --signal TERM --kills 20

An undisturbed run comes first. Then the same command is killed with SIGKILL at a moment
drawn from its whole duration, looked at, and started again, until it has been killed
so often; a run that ends before its kill is compared and begun anew. Every time:

  after a kill   every JSON file and every line of metrics.jsonl can be read, and an
                 export, where there is one, loads and is the undisturbed run's
  at the end     trained parameters, export and metrics are the undisturbed run's, bit
                 for bit (seconds aside)

Prints one JSON object: kills by what the process was doing, runs compared, seconds;
exit code 1 if anything differs. --signal TERM asks instead of killing, and wants exit
code 143 (as a shell has it): the seconds from the signal to the exit are printed too.
Commands: train and attack (emoji-sd, a few steps) and benchmark (its smoke suite).
"""

import argparse
import collections
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from gift_jax.models import weights
from gift_jax.runtime import cli
from gift_jax.runtime.errors import UserError, at_least

ROOT = pathlib.Path(__file__).resolve().parents[1]
QUICK = ("--config.checkpoints.every=3", "--config.log_every=1")
FLAGS = {
    "train": (
        "--config=configs/emoji_gift.py:smoke",
        "--config.steps=12",
        "--config.post_finetune.steps=4",
        *QUICK,
    ),
    "attack": ("--config=configs/emoji_attack.py:smoke", "--config.steps=12", *QUICK),
    "benchmark": ("--config=configs/emoji_benchmark.py:smoke",),
}


class Differs(Exception):
    """A run that was killed is not what it would have been."""


def start(command: str, workdir: pathlib.Path, log) -> subprocess.Popen:
    argv = [sys.executable, "-m", f"gift_jax.{command}", f"--workdir={workdir}"]
    return subprocess.Popen([*argv, *FLAGS[command]], cwd=ROOT, stdout=log, stderr=log)


def undisturbed(command: str, workdir: pathlib.Path) -> tuple[dict, float]:
    """Returns (what a run ends with, its seconds)."""
    began = time.perf_counter()
    with open(workdir.with_suffix(".log"), "w") as log:
        if start(command, workdir, log).wait():
            raise UserError(pathlib.Path(log.name).read_text()[-2000:])
    return outcome(workdir), time.perf_counter() - began


def outcome(workdir: pathlib.Path) -> dict:
    """Returns {file: content, as far as it is not a matter of time}."""
    found = {}
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if path.name == "metrics.jsonl":
            found[name] = [_timeless(line) for line in _lines(path)]
        elif path.name in ("results.json", "cell.json"):
            found[name] = _timeless(json.loads(path.read_text()))
        elif path.name == "export":
            found[name] = weights.content_hash(path)
        elif path.suffix in (".safetensors", ".png"):
            found[name] = _sha256(path)
        elif path.name == "checkpoints" and path.is_dir():
            found |= _checkpoint(name, path)
    return found


def _sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checkpoint(name: str, folder: pathlib.Path) -> dict:
    from gift_jax.training import checkpoint, checksums

    step, params = checkpoint.read_params(folder)
    return {f"{name}/{step}": checksums.of_tree(params)}


def _lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _timeless(value):
    if isinstance(value, dict):
        return {
            key: _timeless(one)
            for key, one in value.items()
            if not (key.startswith("time/") or key in TIMES)
        }
    return [_timeless(one) for one in value] if isinstance(value, list) else value


TIMES = ("seconds", "step_s", "defence_seconds", "defence_step_s", "command")


def check_after_kill(workdir: pathlib.Path, wanted: dict) -> None:
    """Raises Differs if something half-written has its final name."""
    for path in workdir.rglob("*"):
        name = str(path.relative_to(workdir))
        if any(part.startswith(".") or "checkpoints" in part for part in path.parts):
            continue  # Orbax's own; what is in them is compared at the end
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.name == "metrics.jsonl":
                _lines(path)
            elif path.name == "export" and weights.content_hash(path) != wanted[name]:
                raise ValueError("not the undisturbed run's")
            elif path.suffix == ".png" and _sha256(path) != wanted[name]:
                raise ValueError("not the undisturbed run's")
        except (ValueError, KeyError) as error:
            raise Differs(f"{name} after a kill: {error!r}") from error


def compare(workdir: pathlib.Path, wanted: dict) -> None:
    found = outcome(workdir)
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise Differs(f"{name} at the end: {str(found.get(name))[:300]}")


def doing(workdir: pathlib.Path, log: pathlib.Path) -> str:
    """Returns in a word what a process was at, by its log and its folder."""
    if any("orbax-checkpoint-tmp" in path.name for path in workdir.rglob("*")):
        return "saving"
    if any(".tmp-" in path.name for path in workdir.rglob("*")):
        return "writing"
    text = log.read_text()
    if "exported model" in text or "pictures:" in text:
        return "after the export"
    if " each, " in text or "first step took" in text:
        return "steps"
    return "compiling" if "training" in text else "starting"


def stop(process: subprocess.Popen, signum: int, log: pathlib.Path, at: str) -> float:
    """Sends the signal; returns the seconds until the process has ended.

    at: what it is doing. Raises Differs if it goes on as if there had been no signal.
    """
    began = time.perf_counter()
    process.send_signal(signum)
    code = process.wait()
    # Before the command has begun, and after its end, Python's own handler is gone.
    ended = [-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM]
    if at == "after the export":
        ended.append(0)
    if code not in ended:
        raise Differs(f"exit code {code} ({at}): {log.read_text()[-2000:]}")
    return time.perf_counter() - began


def run(command: str, signum: int, kills: int, seed: int, folder: pathlib.Path) -> dict:
    draw = random.Random(seed)
    undisturbed(command, folder / "warm")  # compiles
    wanted, seconds = undisturbed(command, folder / "straight")
    if outcome(folder / "warm") != wanted:
        raise Differs("two undisturbed runs")
    began, at, compared = time.perf_counter(), collections.Counter(), 0
    workdir, log, waited = folder / "killed", folder / "killed.log", []
    while sum(at.values()) < kills or workdir.exists():
        with open(log, "w") as out:
            process = start(command, workdir, out)
            after = draw.uniform(0, 1.05 * seconds)
            try:
                code = process.wait(after if sum(at.values()) < kills else None)
            except subprocess.TimeoutExpired:
                now = doing(workdir, log)
                at[now] += 1
                waited.append(stop(process, signum, log, now))
                check_after_kill(workdir, wanted)
                told = f"{sum(at.values())} of {kills} kills: {dict(at)}"
                told += f"; the last took {waited[-1]:.1f} s"
                print(told, file=sys.stderr, flush=True)
                continue
        if code:
            raise Differs(f"exit code {code}: {log.read_text()[-2000:]}")
        compare(workdir, wanted)
        compared += 1
        shutil.rmtree(workdir)
    return {
        "command": command,
        "kills": dict(at),
        "signal": signal.Signals(signum).name,
        "seconds_to_exit": {
            "median": round(statistics.median(waited), 2),
            "most": round(max(waited), 2),
        },
        "runs_compared": compared,
        "files_compared": len(wanted),
        "seconds_undisturbed": round(seconds, 1),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--command", default="train", choices=tuple(FLAGS))
    flags.add_argument("--kills", type=int, default=50)
    flags.add_argument("--signal", default="KILL", choices=("KILL", "TERM"))
    flags.add_argument("--seed", type=int, default=0)
    args = flags.parse_args()
    at_least("--kills", args.kills, 1)
    with tempfile.TemporaryDirectory() as temp:
        os.environ.setdefault("GIFT_JAX_CACHE", f"{temp}/cache")
        try:
            signum = signal.Signals[f"SIG{args.signal}"]
            folder = pathlib.Path(temp)
            found = run(args.command, signum, args.kills, args.seed, folder)
        except Differs as error:
            print(f"differs: {error}", file=sys.stderr)
            return 1
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    cli.run_main(main)
