# SPDX-License-Identifier: Apache-2.0
"""Functions over rows in batches of one size."""

import jax
import numpy as np
import pytest

from gift_jax.models.batching import map_batches


def test_rows_are_those_of_one_call_and_the_function_compiles_once(rng):
    arrays = {"x": rng.normal(size=(7, 3)), "y": rng.normal(size=7)}
    traced = []

    @jax.jit
    def fn(part):
        traced.append(part["x"].shape)
        return part["x"] * 2, part["y"] + 1

    doubled, increased = map_batches(fn, arrays, 4)
    np.testing.assert_allclose(doubled, 2 * arrays["x"], rtol=1e-6)
    np.testing.assert_allclose(increased, arrays["y"] + 1, rtol=1e-6)
    assert type(doubled) is np.ndarray and traced == [(4, 3)]


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="at least one row"):
        map_batches(lambda x: x, np.zeros((0, 2)), 4)
