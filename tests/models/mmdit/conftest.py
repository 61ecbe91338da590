# SPDX-License-Identifier: Apache-2.0
"""Tiny random Stable Diffusions 3, as folders."""

import pytest
from tiny_sd3 import write_tiny_sd3


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory):
    """A tiny SD 3.5 medium's folder; read only, copy it before a change."""
    return write_tiny_sd3(tmp_path_factory.mktemp("tiny") / "sd3")
