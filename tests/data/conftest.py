# SPDX-License-Identifier: Apache-2.0
import pytest

from gift_jax.data.sources import emoji


@pytest.fixture(scope="session")
def emoji_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def pictures(emoji_cache):
    """The embedded set, prepared from nothing in a folder of this test run."""
    return emoji.load(emoji_cache)
