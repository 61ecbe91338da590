# SPDX-License-Identifier: Apache-2.0
"""Versions of the libraries that numbers depend on."""

import importlib.metadata
import importlib.util

import gift_jax


def versions() -> dict[str, str]:
    """Returns the versions that numbers may depend on, for results files."""
    names = "jax", "jaxlib", "flax", "optax", "diffusers", "numpy"
    found = {name: importlib.metadata.version(name) for name in names}
    return {"gift_jax": gift_jax.__version__, **found}
