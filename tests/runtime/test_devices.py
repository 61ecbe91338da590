# SPDX-License-Identifier: Apache-2.0
"""Twenty steps of GIFT on one device and on eight: the same numbers."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import quick_compile
from tiny_model import write_pictures

import gift_jax
from gift_jax.training import checkpoint

ROOT = pathlib.Path(gift_jax.__file__).parents[1]
STEPS, BATCH = 20, 8


def test_one_and_eight_devices_agree(tiny_folder, tmp_path_factory, pytestconfig):
    pictures = write_pictures(tmp_path_factory.mktemp("pictures"), 8, 3)
    cache = pytestconfig.cache.mkdir("devices")
    env = os.environ | {"GIFT_JAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    env |= {"XLA_FLAGS": quick_compile.flags()}
    params = []
    for devices in (1, 8):
        workdir = tmp_path_factory.mktemp("run")
        argv = [sys.executable, "-m", "gift_jax.train", f"--workdir={workdir}"]
        argv += ["--config=configs/emoji_gift.py:smoke", f"--config.steps={STEPS}"]
        argv += [f"--config.model={tiny_folder}", "--config.samples.num=0"]
        argv += [f"--config.hardware.cpu_devices={devices}", "--config.log_every=20"]
        for group in ("harmful", "safe"):
            argv += [f"--config.{group}.names=()", f"--config.{group}.prompt=a {group}"]
            argv += [f"--config.{group}.folder={pictures}"]
            argv += [f"--config.{group}.batch={BATCH}"]
        subprocess.run(argv, cwd=ROOT, env=env, check=True, capture_output=True)
        params.append(checkpoint.read_params(workdir / "checkpoints")[1])
    differences = [
        np.linalg.norm(a - b) / np.linalg.norm(a)
        for a, b in zip(*map(jax.tree.leaves, params), strict=True)
    ]
    assert len(differences) > 10
    assert 0 < max(differences) < 1e-5  # sums in another order
