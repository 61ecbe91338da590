# SPDX-License-Identifier: Apache-2.0
"""Twenty steps of GIFT on one device and on eight: the same numbers."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import quick_compile
from tiny_model import write_pictures

import gift_jax
from gift_jax.training import checkpoint

ROOT = pathlib.Path(gift_jax.__file__).parents[1]
STEPS, BATCH = 20, 8


pytestmark = pytest.mark.slow  # two devices: tests/defenses/test_gift_unet.py


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory, pytestconfig):
    """{run: trained parameters}: on one device, on eight, and on eight again."""
    pictures = write_pictures(tmp_path_factory.mktemp("pictures"), 8, 3)
    cache = pytestconfig.cache.mkdir("devices")
    env = os.environ | {"GIFT_JAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"}
    env |= {"XLA_FLAGS": quick_compile.flags()}
    params = {}
    for name, devices in (("one", 1), ("eight", 8), ("again", 8)):
        workdir = tmp_path_factory.mktemp(name)
        argv = [sys.executable, "-m", "gift_jax.train", f"--workdir={workdir}"]
        argv += ["--config=configs/emoji_gift.py:smoke", f"--config.steps={STEPS}"]
        argv += [f"--config.model={tiny_folder}", "--config.samples.num=0"]
        argv += ["--config.verify=off"]
        argv += [f"--config.hardware.cpu_devices={devices}", "--config.log_every=20"]
        for group in ("harmful", "safe"):
            argv += [f"--config.{group}.names=()", f"--config.{group}.prompt=a {group}"]
            argv += [f"--config.{group}.folder={pictures}"]
            argv += [f"--config.{group}.batch={BATCH}"]
        subprocess.run(argv, cwd=ROOT, env=env, check=True, capture_output=True)
        _, params[name] = checkpoint.read_params(workdir / "checkpoints")
    return params


def test_one_and_eight_devices_agree(trained):
    differences = [
        np.linalg.norm(a - b) / np.linalg.norm(a)
        for a, b in zip(
            *(jax.tree.leaves(trained[name]) for name in ("one", "eight")), strict=True
        )
    ]
    assert len(differences) > 10
    assert 0 < max(differences) < 1e-5  # sums in another order


def test_the_same_devices_give_the_same_bits(trained):
    jax.tree.map(np.testing.assert_array_equal, trained["eight"], trained["again"])
