# SPDX-License-Identifier: Apache-2.0
"""Models as JAX functions."""

from gift_jax import torchless

with torchless.imports():  # they look for PyTorch once, here
    import diffusers  # noqa: F401
    import transformers  # noqa: F401
