# SPDX-License-Identifier: Apache-2.0
"""What part of a run is the compiled step, and what does a second run compile?

    python perf/steady_state.py --steps 300

Runs `gift_jax.train` on emoji-sd twice, in processes of their own, with an empty
compilation cache of their own, and prints one JSON object: of each run the seconds in
all, how many programs were compiled and how many came from the cache; and of the second
the share of the loop's time, from its second step to its last (metrics, checkpoints and
data included), that was spent inside the compiled step, and in writing checkpoints at
the config's interval (their checksums included). The first is a lower bound: the
measurement waits for every step, where a run prepares the next batch meanwhile.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from gift_jax.runtime import cli
from gift_jax.runtime.errors import at_least

ROOT = pathlib.Path(__file__).resolve().parents[1]
_COMPILED = "/jax/core/compile/backend_compile_duration"
_FOUND = "/jax/compilation_cache/cache_hits"


def measure(workdir: str, config_file: str, steps: int) -> dict:
    """Returns the figures of one run, in this process."""
    import jax

    from gift_jax import train
    from gift_jax.training import checkpoint, loop

    asked = {"programs": 0, "from_cache": 0}

    def count(event, *_, **__):
        asked["programs"] += event == _COMPILED
        asked["from_cache"] += event == _FOUND

    jax.monitoring.register_event_duration_secs_listener(count)
    jax.monitoring.register_event_listener(count)
    inside, ends, saving = [], [], []
    compile_step = loop.compile_step

    def watched(step_fn, placed=None):
        step = compile_step(step_fn, placed)

        def call(*args):
            clock = time.perf_counter()
            out = jax.block_until_ready(step(*args))
            ends.append(time.perf_counter())
            inside.append(ends[-1] - clock)
            return out

        return call

    save = checkpoint.Checkpoints.save

    def timed_save(*args):
        clock = time.perf_counter()
        save(*args)
        saving.append(time.perf_counter() - clock)

    loop.compile_step, checkpoint.Checkpoints.save = watched, timed_save
    began = time.perf_counter()
    argv = [f"--config={config_file}", f"--workdir={workdir}"]
    argv += [f"--config.steps={steps}", "--config.post_finetune.steps=0"]
    train.main(argv)
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "steps": len(inside),
        **asked,
        "compiled": asked["programs"] - asked["from_cache"],
        "seconds_a_step": round(sum(inside[1:]) / len(inside[1:]), 4),
        "checkpoints": len(saving),
        "saving": round(sum(saving[:-1]) / (ends[-1] - ends[0]), 4),
        "inside_the_step": round(sum(inside[1:]) / (ends[-1] - ends[0]), 4),
    }


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--config", default=str(ROOT / "configs" / "emoji_gift.py"))
    flags.add_argument("--steps", type=int, default=300)
    flags.add_argument("--into", help=argparse.SUPPRESS)
    args = flags.parse_args()
    at_least("--steps", args.steps, 3)
    if args.into:
        found = measure(args.into, args.config, args.steps)
        (pathlib.Path(args.into) / "found.json").write_text(json.dumps(found))
        return 0
    found = {}
    with tempfile.TemporaryDirectory() as temp:
        environ = os.environ | {"GIFT_JAX_CACHE": f"{temp}/cache"}
        for run in ("first", "second"):
            into = f"--into={temp}/{run}"
            command = [sys.executable, __file__, into, f"--steps={args.steps}"]
            command.append(f"--config={args.config}")
            subprocess.run(command, env=environ, check=True)
            file = pathlib.Path(temp) / run / "found.json"
            found[run] = json.loads(file.read_text())
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    cli.run_main(main)
