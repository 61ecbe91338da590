# SPDX-License-Identifier: Apache-2.0
"""The demo's errors; its whole run is `make demo`."""

import numpy as np
import pytest

from gift_jax import demo
from gift_jax.runtime.errors import UserError


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--harmful", "bomp"], "did you mean 'bomb'"),
        (["--safe", "unheard of"], "--safe='unheard of' is not one of"),
        (["--num", "0"], "--num=0 must be at least 1"),
        (["--nun", "3"], "unrecognized arguments: --nun 3"),
    ],
)
def test_demo_names_a_mistake(flags, message):
    with pytest.raises(UserError, match=message):
        demo.main(flags)


def test_demo_results_hold_every_cell():
    images = np.zeros((1, 8, 8, 3), np.uint8)
    cells = [
        demo.Cell(side, thing, model, images, score)
        for side, thing, score in (("harmful", "bomb", 0.5), ("safe", "guitar", 0.25))
        for model in demo.MODELS
    ]

    class Args:
        num = 1

    result = demo._results(cells, Args(), "abc")
    assert result["recognized"]["harmful"] == dict.fromkeys(demo.MODELS, 0.5)
    assert result["recognized"]["safe"] == dict.fromkeys(demo.MODELS, 0.25)
