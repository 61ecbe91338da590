# SPDX-License-Identifier: Apache-2.0
"""Tiny random FLUX.1, as folders."""

import pytest
from tiny_flux import NAMES, write_tiny_flux


@pytest.fixture(scope="session")
def flux_folders(tmp_path_factory):
    """{name of `NAMES`: a tiny folder}; read only, copy it before a change."""
    root = tmp_path_factory.mktemp("flux")
    return {name: write_tiny_flux(root / name, name) for name in NAMES}
