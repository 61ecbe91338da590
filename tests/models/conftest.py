# SPDX-License-Identifier: Apache-2.0
"""The tiny model with every kind of block, in place of the one that compiles fast."""

import pytest
from tiny_model import WHOLE_UNET, write_tiny

from gift_jax.models.sd import stable_diffusion


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny random Stable Diffusion's folder; read only, copy it before a change."""
    return write_tiny(tmp_path_factory.mktemp("whole") / "sd", unet=WHOLE_UNET)


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """The tiny model, loaded: 8x8x4 latents, 16x16 pixels, text 16 tokens by 32."""
    return stable_diffusion.load(tiny_folder)
