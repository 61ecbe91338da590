# SPDX-License-Identifier: Apache-2.0
import os
import pathlib
import subprocess
import sys

import numpy as np

from gift_jax.data.pairs import PairsSpec, load_pairs
from gift_jax.data.sources import emoji

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
    for i, row in enumerate(emoji.read_metadata()):
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


def test_loading_needs_neither_a_cache_nor_tensorflow_datasets(tmp_path):
    code = (
        "import sys; from gift_jax.data.sources import emoji;"
        "print(len(emoji.load().images), 'tensorflow_datasets' in sys.modules)"
    )
    env = os.environ | {"GIFT_JAX_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["2880", "False"]
    assert not list(tmp_path.iterdir())


def test_builder_gives_the_same_images_to_the_tfds_source(pictures, tmp_path):
    from gift_jax.data.sources import emoji_builder

    emoji_builder.prepare(tmp_path)
    rows = np.random.default_rng(0).permutation(len(pictures.images))[:5]
    spec = PairsSpec(tfds="emoji64", tfds_data_dir=str(tmp_path), caption_key="concept")
    data = load_pairs(spec)
    assert len(data) == 2880 and "tensorflow" not in sys.modules
    stored = {image.tobytes() for image in data.images}
    assert {pictures.images[row].tobytes() for row in rows} <= stored
    assert sorted(set(data.concepts)) == list(pictures.concepts)
