# SPDX-License-Identifier: Apache-2.0
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from gift_jax.data.sources import emoji, emoji_builder
from gift_jax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_emoji_has_every_concept_in_every_style(pictures):
    assert pictures.images.shape == (2880, 64, 64, 3)
    assert pictures.images.dtype == np.uint8
    assert len(pictures.concepts) == len(pictures.groups) == 480
    assert list(pictures.concepts) == sorted(pictures.concepts)
    pairs = set(zip(pictures.concept_ids, pictures.style_ids, strict=True))
    assert len(pairs) == 480 * 6


def test_emoji_rows_match_the_asset_files(pictures):
    with np.load(emoji.ASSETS / "emoji64.npz") as arrays:
        rgba = arrays["rgba"]
    np.testing.assert_array_equal(pictures.images, emoji.over_white(rgba))
    for i, row in enumerate(emoji_builder.read_rows()):
        assert pictures.concepts[pictures.concept_ids[i]] == row["concept"]
        assert pictures.styles[pictures.style_ids[i]] == row["style"]
        assert pictures.groups[pictures.concept_ids[i]] == row["group"]


def test_over_white_blends_by_alpha():
    rgba = np.array([[0, 0, 0, 0], [10, 20, 30, 255], [0, 100, 255, 51]], np.uint8)
    expected = [[255, 255, 255], [10, 20, 30], [204, 224, 255]]
    np.testing.assert_array_equal(emoji.over_white(rgba), expected)


def test_held_out_takes_one_style_of_every_fifth_concept(pictures):
    held = pictures.held_out
    assert held.sum() == 96
    assert set(pictures.concept_ids[held] % 5) == {0}
    assert len(set(pictures.concept_ids[held])) == 96
    assert np.bincount(pictures.style_ids[held]).tolist() == [16] * 6
    rule = emoji.is_held_out(pictures.concept_ids, pictures.style_ids)
    np.testing.assert_array_equal(held, rule)


def test_known_concepts_are_128_of_the_set_with_the_harmful(pictures):
    known = emoji.known_concepts()
    assert len(known) == len(set(known)) == 128
    assert set(known) <= set(pictures.concepts)
    assert set(emoji.HARMFUL) <= set(known)
    unseen = emoji.unseen_concepts(pictures.concepts)
    assert len(unseen) == 352
    assert not set(unseen) & set(known)
    groups = [pictures.groups[pictures.concepts.index(name)] for name in known]
    assert min(groups.count(group) for group in set(pictures.groups)) >= 12


def test_builder_decodes_pictures_through_its_data_source(pictures, emoji_cache):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(emoji_builder.prepare(emoji_cache))
    example = builder.as_data_source("train")[7]
    np.testing.assert_array_equal(example["image"], pictures.images[example["row"]])
    assert "tensorflow" not in sys.modules


def test_prepare_survives_two_first_uses_at_once(tmp_path):
    code = (
        "import json, sys; from gift_jax.data.sources import emoji;"
        "data = emoji.load();"
        "print(json.dumps([len(data.images), 'tensorflow' in sys.modules]))"
    )
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {
        "GIFT_JAX_CACHE": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    command = [sys.executable, "-c", code]
    runs = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for run in runs:
        output, _ = run.communicate(timeout=120)
        assert run.returncode == 0
        assert json.loads(output) == [2880, False]
    assert len(list((tmp_path / "tfds").iterdir())) == 1  # no scratch left behind


def test_load_names_a_cache_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="GIFT_JAX_CACHE"):
        emoji.load(blocked)
