# SPDX-License-Identifier: Apache-2.0
"""Commands do not import PyTorch; who uses the library has it with diffusers."""

import subprocess
import sys

import pytest

pytest.importorskip("torch")


def imported(*argv):
    """Returns the names of the modules that a Python process has imported."""
    argv = [sys.executable, "-X", "importtime", *argv]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def test_commands_start_without_it():
    names = imported("-m", "gift_jax.train", "--help")
    assert "diffusers.utils.import_utils" in names
    assert "torch._C" not in names


def test_the_library_leaves_it_to_diffusers():
    says = "import diffusers; assert diffusers.utils.is_torch_available()"
    names = imported("-c", f"import gift_jax.models.hooks; {says}")
    assert "torch._C" in names
