# SPDX-License-Identifier: Apache-2.0
"""Versions of the libraries that results depend on."""

import importlib.metadata

import gift_jax


def versions() -> dict[str, str]:
    """Returns the versions that a result may depend on, for results files."""
    names = "jax", "jaxlib", "flax", "optax", "transformers", "numpy"
    libraries = {name: importlib.metadata.version(name) for name in names}
    return {"gift_jax": gift_jax.__version__, **libraries}
