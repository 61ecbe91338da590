# SPDX-License-Identifier: Apache-2.0
"""What the scripts of this folder measure: GIFT's outer step and a UNet's training.

Imported by its neighbors, each of them run as `python perf/NAME.py`.
"""

import pathlib
import platform
import re
import statistics
import time

import numpy as np

from gift_jax.runtime.config import load_config

ROOT = pathlib.Path(__file__).resolve().parents[1]
LEVELS = ("lower", "upper")
BATCH = 64  # of a training step of emoji-sd
PROMPTS = ("a noto emoji of a guitar",) * 24  # of images of emoji-sd
SAMPLING_STEPS, GUIDANCE = 25, 3.0


def gift_config():
    """Returns the config of GIFT's outer step, as published."""
    return load_config(str(ROOT / "configs" / "emoji_gift.py"))


def pair_counts(part: str, cfg, batch: int = 1) -> dict[str, int]:
    """Returns the pairs of each level of a part of vs_pytorch.py.

    Args: batch: those of the sd15 parts.
    """
    if part.startswith("sd15"):
        return {"safe": batch, "harmful": batch}
    return {group: cfg[group].batch for group in ("safe", "harmful")}


def latent_side(part: str) -> int:
    """Returns the side of a part's latents, 0: the model's own."""
    return int(part[-2:]) if part.startswith("sd15") else 0


def random_pairs(count: int, latents: tuple, text: tuple) -> dict[str, np.ndarray]:
    """Returns cached pairs, as a training step reads them; text: shape of states."""
    rng = np.random.default_rng(0)
    return {
        "mean": rng.normal(size=(count, *latents)).astype(np.float32),
        "std": rng.uniform(0.01, 0.1, size=(count, *latents)).astype(np.float32),
        "states": rng.normal(size=(count, *text)).astype(np.float32),
    }


def training_batch(latents: tuple, text: tuple) -> dict[str, np.ndarray]:
    """Returns random latents, timesteps, text states and noise of one step."""
    rng = np.random.default_rng(0)
    return {
        "z_t": rng.normal(size=(BATCH, *latents)).astype(np.float32),
        "t": rng.integers(0, 1000, BATCH).astype(np.int32),
        "states": rng.normal(size=(BATCH, *text)).astype(np.float32),
        "eps": rng.normal(size=(BATCH, *latents)).astype(np.float32),
    }


def text_shape(model) -> tuple[int, int]:
    """Returns (tokens, width) of one prompt's states."""
    return model.max_length, model.text_encoder.config.hidden_size


def gift_pairs(model, counts: dict[str, int], side: int) -> dict:
    """Returns every group's cached pairs, the latents' sides so many wide."""
    latents = model.latent_shape[0], side, side
    batches = {}
    for name, count in counts.items():
        pairs = random_pairs(count, latents, text_shape(model))
        cond = {"states": pairs.pop("states")}
        batches[name] = pairs | {"cond": cond, "concept": np.zeros(count, np.int32)}
    return batches


def gift_step(model, cfg):
    """Returns (GIFT's compiled outer step, state, frozen), as `gift_jax.train` has."""
    from gift_jax import train
    from gift_jax.data.pairs import Pairs
    from gift_jax.defenses import base
    from gift_jax.state import init_state
    from gift_jax.training import loop

    run = train.resolve(cfg)
    pairs = Pairs(np.zeros((1, 1, 1, 3), np.uint8), [""], ["bomb"], [""], np.ones(1))
    data = dict.fromkeys(run.data, pairs)
    task = base.Task(run.settings, run, model, data, sources={})
    plan = base.load(run.method).plan(task)
    return loop.compile_step(plan.step), init_state(plan.params, plan.opt), plan.frozen


def median_seconds(run, repeats: int, warm_up: int = 2) -> float:
    """Returns the median time of a function that waits for what it computes."""
    seconds = []
    for _ in range(repeats + warm_up):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warm_up:])


def processor() -> str:
    """Names the CPU, on which the ratios depend.

    Virtual machines hide the product's name, so family, model and stepping follow.
    """
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine()
    lines = (line for line in text.splitlines() if ":" in line)
    values = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines)
    name = values.get("model name") or platform.machine()
    fields = ("cpu family", "model", "stepping")
    return ", ".join([name, *(f"{f} {values[f]}" for f in fields if f in values)])
