# SPDX-License-Identifier: Apache-2.0
import itertools
import json

import numpy as np
import pytest

from gift_jax.data import pipeline
from gift_jax.runtime.errors import UserError

SIZE = 10


@pytest.fixture
def source():
    ids = np.arange(SIZE, dtype=np.int32)
    return pipeline.ArraySource(
        {"id": ids, "z": np.stack([ids, -ids], axis=1).astype(float)}
    )


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


def ids(iterator, count):
    return [batch["id"].tolist() for batch in itertools.islice(iterator, count)]


def test_batches_repeat_for_a_seed_and_differ_for_another(source):
    first = ids(pipeline.batches(source, 5, seed=0), 4)
    assert first == ids(pipeline.batches(source, 5, seed=0), 4)
    assert first != ids(pipeline.batches(source, 5, seed=1), 4)


def test_batches_shuffle_anew_each_epoch(source):
    got = ids(pipeline.batches(source, 5, seed=0), 4)
    one, two = got[0] + got[1], got[2] + got[3]
    assert sorted(one) == sorted(two) == list(range(SIZE))
    assert one != two


def test_batches_keep_rows_together(source):
    for batch in itertools.islice(pipeline.batches(source, 5, seed=0), 4):
        np.testing.assert_array_equal(batch["z"][:, 0], batch["id"])
        np.testing.assert_array_equal(batch["z"][:, 1], -batch["id"])


def test_batches_drop_the_remainder_or_run_on(source):
    dropped = ids(pipeline.batches(source, 4, seed=0), 4)
    for epoch in (dropped[:2], dropped[2:]):  # of ten, eight are read
        assert len(set(flat(epoch))) == 8
    assert set(flat(dropped[:2])) != set(flat(dropped[2:]))
    run_on = ids(pipeline.batches(source, 4, seed=0, drop_remainder=False), 5)
    order = flat(run_on)
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(SIZE))
    (small,) = ids(pipeline.batches(source, 16, seed=0, drop_remainder=False), 1)
    assert sorted(small[:10]) == list(range(SIZE)) and len(small) == 16


def test_batches_resumed_mid_epoch_equal_a_straight_run(source):
    straight = ids(pipeline.batches(source, 2, seed=3), 12)
    first = pipeline.batches(source, 2, seed=3)
    head = ids(first, 7)
    state = json.loads(json.dumps(first.get_state()))
    second = pipeline.batches(source, 2, seed=3)
    second.set_state(state)
    assert head + ids(second, 5) == straight


def test_batches_of_two_processes_partition_the_global_batch(source):
    whole = pipeline.batches(source, 4, seed=0)
    parts = [
        pipeline.batches(source, 4, 0, process_index=p, process_count=2) for p in (0, 1)
    ]
    for _ in range(5):
        want, left, right = next(whole), next(parts[0]), next(parts[1])
        assert left["id"].tolist() + right["id"].tolist() == want["id"].tolist()
        assert not set(left["id"]) & set(right["id"])
        assert left["index"].tolist() == [0, 1]
        assert right["index"].tolist() == [2, 3]
        assert want["index"].tolist() == [0, 1, 2, 3]


def test_batches_state_moves_between_process_counts(source):
    whole = pipeline.batches(source, 4, seed=0)
    ids(whole, 3)
    part = pipeline.batches(source, 4, 0, process_index=1, process_count=2)
    part.set_state(whole.get_state())
    assert next(part)["id"].tolist() == next(whole)["id"].tolist()[2:]


def test_batches_refuse_what_cannot_work(source):
    with pytest.raises(UserError, match="no examples"):
        pipeline.batches(pipeline.ArraySource({"id": np.zeros(0)}), 1, 0)
    with pytest.raises(UserError, match="batch_size=3 must divide by 2 processes"):
        pipeline.batches(source, 3, 0, process_count=2)
    with pytest.raises(UserError, match="batch_size=16 is larger than the data"):
        pipeline.batches(source, 16, 0)
    with pytest.raises(UserError, match="batch_size=0"):
        pipeline.batches(source, 0, 0)


def test_repeated_entries_read_like_the_array_they_stand_for():
    table, rows = np.asarray([[1.0, 2.0], [3.0, 4.0]]), np.asarray([0, 1, 1, 0])
    repeated = pipeline.DeduplicatedArray(table, rows)
    source = pipeline.ArraySource({"x": repeated, "i": np.arange(4)})
    np.testing.assert_array_equal(repeated[:], table[rows])
    np.testing.assert_array_equal(source[2]["x"], [3.0, 4.0])
    positions = np.asarray([3, 1])
    np.testing.assert_array_equal(source.take(positions)["x"], table[rows][positions])


def test_array_source_refuses_uneven_arrays():
    with pytest.raises(ValueError, match="one length"):
        pipeline.ArraySource({"a": np.zeros(2), "b": np.zeros(3)})
