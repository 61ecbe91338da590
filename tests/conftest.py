# SPDX-License-Identifier: Apache-2.0
"""Strict settings for every test, and a tiny random Stable Diffusion."""

import gc
import os

import quick_compile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test downloads
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=2 "
    + quick_compile.flags()  # most of the time goes into compiling
)

import jax
import numpy as np
import pytest
from absl import logging
from command_runs import (  # noqa: F401 - fixtures
    dreambooth_run,
    image_folder,
    immunized,
    inversion_run,
    lora_run,
    run_attack,
    run_train,
)

from gift_jax.runtime import devices

jax.config.update("jax_numpy_rank_promotion", "raise")

LONG = (  # files that take a minute and more, longest first
    *("test_train", "test_attack", "test_cells", "test_gradients", "test_compile"),
    *("test_pretrain", "test_processes", "test_devices", "test_quickstart"),
)


def pytest_configure(config):
    """Keeps compiled programs between runs; hushes the progress log."""
    gc.freeze()  # a tenth of a test's time went into looking through what stays
    gc.set_threshold(50_000, 20, 50)
    devices.CACHE_MIN_COMPILE_S = 0.5  # most quick programs are needed once
    devices.keep_programs(config.cache.mkdir("jax"))
    logging.set_verbosity(logging.WARNING)


def pytest_collection_modifyitems(items):
    """Long files come first, so that pytest-xdist's processes end together."""
    rank = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny random Stable Diffusion's folder; read only, copy it before a change."""
    from tiny_model import write_tiny

    return write_tiny(tmp_path_factory.mktemp("tiny") / "sd")


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """The tiny model, loaded: 8x8x4 latents, 16x16 pixels, text 16 tokens by 32."""
    from gift_jax.models.sd import stable_diffusion

    return stable_diffusion.load(tiny_folder)


@pytest.fixture(scope="session")
def tiny_xl_folder(tmp_path_factory):
    """A tiny random SDXL's folder; read only, copy it before a change."""
    from tiny_model import write_tiny_xl

    return write_tiny_xl(tmp_path_factory.mktemp("tiny") / "xl")


@pytest.fixture(scope="session")
def tiny_xl(tiny_xl_folder):
    """The tiny SDXL, loaded."""
    from gift_jax.models.sd import stable_diffusion

    return stable_diffusion.load(tiny_xl_folder)


@pytest.fixture
def asked_of_hub(monkeypatch, tmp_path):
    """What the hub is asked for, filled in by a download that gives an empty folder."""
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **how: asked.update(how) or tmp_path,
    )
    return asked


@pytest.fixture
def log_lines(monkeypatch):
    """What is logged as information, which the tests hush."""
    lines = []

    def info(text, *args, **_):  # Orbax logs a dict
        lines.append(text % args if args else str(text))

    monkeypatch.setattr(logging, "info", info)
    return lines


@pytest.fixture
def rng():
    """NumPy's generator, seeded alike in every test."""
    return np.random.default_rng(0)
