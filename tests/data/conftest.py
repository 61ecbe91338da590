# SPDX-License-Identifier: Apache-2.0
import pytest

from gift_jax.data.sources import emoji


@pytest.fixture(scope="session")
def pictures():
    """The embedded set."""
    return emoji.load()
