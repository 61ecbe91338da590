# SPDX-License-Identifier: Apache-2.0
"""Similarity gap ratios and their intervals."""

import numpy as np
import pytest
import scipy.stats

from gift_jax.benchmark import gap_ratios


def test_gap_ratio_is_the_share_that_the_defense_removes():
    assert gap_ratios.gap_ratio(0.8, 0.8) == 0.0
    assert gap_ratios.gap_ratio(0.8, 0.0) == 1.0
    assert gap_ratios.gap_ratio(0.815, 0.771) == pytest.approx(0.053988, abs=1e-6)
    assert gap_ratios.gap_ratio(0.4, 0.6) == pytest.approx(-0.5)
    assert gap_ratios.gap_ratio(0.0, 0.1) is None


@pytest.mark.parametrize("pair", [(-0.1, 0.2), (0.1, -0.2)])
def test_negative_similarity_is_refused(pair):
    with pytest.raises(ValueError, match="at least 0"):
        gap_ratios.gap_ratio(*pair)


def test_trajectory_gaps_are_of_means_peaks_and_ends():
    found = gap_ratios.trajectory_gaps([0.2, 1.0, 0.6], [0.2, 0.3, 0.4])
    assert found == pytest.approx({"mean": 0.5, "peak": 0.6, "final": 1 / 3})
    assert list(found) == list(gap_ratios.OVER)


@pytest.mark.parametrize("steps", [([], []), ([0.1], [0.1, 0.2])])
def test_trajectories_of_other_lengths_are_refused(steps):
    with pytest.raises(ValueError, match="steps without a defense"):
        gap_ratios.trajectory_gaps(*steps)


def test_bootstrap_equals_scipys_and_narrows_with_more_concepts(rng):
    few = rng.normal(0.5, 0.2, size=9)
    low, high = gap_ratios.bootstrap(few)
    expected = scipy.stats.bootstrap(
        (few,), np.mean, method="percentile", n_resamples=10_000, rng=1
    ).confidence_interval
    assert low == pytest.approx(expected.low, abs=0.01)
    assert high == pytest.approx(expected.high, abs=0.01)
    assert low < few.mean() < high
    wide, narrow = gap_ratios.bootstrap(few), gap_ratios.bootstrap(np.tile(few, 10))
    assert narrow[1] - narrow[0] < 0.5 * (wide[1] - wide[0])
    assert (
        gap_ratios.bootstrap(few)
        == gap_ratios.bootstrap(few)
        != gap_ratios.bootstrap(few, seed=1)
    )
    assert gap_ratios.bootstrap([0.3]) == pytest.approx((0.3, 0.3))


def test_bootstrap_of_nothing_is_refused():
    with pytest.raises(ValueError, match="one number a concept"):
        gap_ratios.bootstrap([])
