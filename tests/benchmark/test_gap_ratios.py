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


def test_trajectory_is_reduced_to_mean_peak_and_end():
    reduced = gap_ratios.reductions([0.2, 1.0, 0.6])
    assert reduced == pytest.approx({"mean": 0.6, "peak": 1.0, "final": 0.6})
    assert list(reduced) == list(gap_ratios.OVER)
    with pytest.raises(ValueError, match="without a point"):
        gap_ratios.reductions([])


def test_ratio_of_a_concept_is_that_of_its_seeds_means():
    assert gap_ratios.concept_ratio([(0.6, 0.0), (1.0, 0.4)]) == pytest.approx(0.75)
    assert gap_ratios.concept_ratio([(0.0, 0.1), (0.0, 0.0)]) is None


def test_interval_of_ratios_counts_concepts_and_seeds(rng):
    one_seed = [[(1.0, x)] for x in rng.uniform(0.2, 0.8, size=9)]
    interval = gap_ratios.ratio_interval(one_seed, num=20_000)
    ratios = [1 - pairs[0][1] for pairs in one_seed]
    assert interval == pytest.approx(gap_ratios.bootstrap(ratios), abs=0.01)
    # the same mean of each concept, from seeds that differ: less certain
    spread = [[(1.0, x + 0.3), (1.0, x - 0.3)] for ((_, x),) in one_seed]
    wide = gap_ratios.ratio_interval(spread, num=20_000)
    assert wide[1] - wide[0] > 1.2 * (interval[1] - interval[0])
    assert gap_ratios.ratio_interval([[(0.5, 0.1)]]) == pytest.approx((0.8, 0.8))
    # a seed on which the original reaches nothing has no ratio of its own
    low, high = gap_ratios.ratio_interval([[(0.0, 0.5), (1.0, 0.5)]])
    assert np.isfinite([low, high]).all()


def test_nested_interval_counts_groups_and_members(rng):
    values = rng.normal(0.5, 0.2, size=9)
    flat = gap_ratios.nested_interval([[x] for x in values], num=20_000)
    assert flat == pytest.approx(gap_ratios.bootstrap(values), abs=0.01)
    spread = gap_ratios.nested_interval([[x - 0.4, x + 0.4] for x in values])
    assert spread[1] - spread[0] > 1.2 * (flat[1] - flat[0])
    assert gap_ratios.nested_interval([[0.3]]) == pytest.approx((0.3, 0.3))


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
