# SPDX-License-Identifier: Apache-2.0
"""Versions of the libraries that results depend on."""

import functools
import importlib.metadata
import pathlib
import subprocess

import gift_jax


def versions() -> dict[str, str]:
    """Returns the versions that a result may depend on, for results files."""
    names = "jax", "jaxlib", "flax", "optax", "transformers", "numpy"
    libraries = {name: importlib.metadata.version(name) for name in names}
    return {"gift_jax": gift_jax.__version__, **libraries}


@functools.cache
def versions_and_commit() -> dict[str, str]:
    """Returns `versions` and, in a clone, this package's commit."""
    root = pathlib.Path(gift_jax.__file__).parents[1]
    if not (root / ".git").exists():
        return versions()
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return versions()
    return versions() | {"commit": done.stdout.strip()}
