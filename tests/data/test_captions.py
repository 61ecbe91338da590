# SPDX-License-Identifier: Apache-2.0
import hashlib

import numpy as np
import pytest

from gift_jax.data import captions
from gift_jax.runtime.errors import UserError


@pytest.mark.parametrize("index", range(len(captions.TEMPLATES)))
def test_caption_names_style_and_concept(index):
    text = captions.caption("guitar", "black and white", index)
    assert "guitar" in text
    assert "black and white" in text
    assert "{" not in text


def test_caption_templates_differ():
    texts = {captions.caption("owl", "noto", i) for i in range(len(captions.TEMPLATES))}
    assert len(texts) == len(captions.TEMPLATES)


def test_caption_index_wraps_around():
    count = len(captions.TEMPLATES)
    assert captions.caption("owl", "noto", count) == captions.caption("owl", "noto", 0)


@pytest.mark.parametrize(
    ("concept", "expected"),
    [
        ("owl", "an owl"),
        ("bomb", "a bomb"),
        ("unicorn", "a unicorn"),
        ("crossed swords", "crossed swords"),
        ("sushi", "sushi"),
        ("locked", "locked"),
        ("a lantern", "a lantern"),
        ("an old map", "an old map"),
        ("antenna", "an antenna"),
    ],
)
def test_with_article_follows_english(concept, expected):
    assert captions.with_article(concept) == expected


def test_caption_article_follows_the_style():
    assert captions.caption("owl", "openmoji", 0) == "an openmoji emoji of an owl"
    assert captions.caption("owl", "noto", 0) == "a noto emoji of an owl"


def test_nonce_words_mean_nothing_and_differ(pictures):
    rng = np.random.default_rng(0)
    words = [captions.nonce_word(rng) for _ in range(3000)]
    assert len(set(words)) > 2000 and "sks" not in words
    assert min(map(len, words)) == 3 and max(map(len, words)) <= 9
    said = " ".join([*pictures.concepts, *pictures.styles]).split()
    assert not set(said) & set(words)


def test_nonce_templates_need_the_nonce_and_may_have_a_style():
    template = "{a_style} emoji of {nonce}"
    told = captions.fill_nonce(template, "vok", "openmoji")
    assert told == "an openmoji emoji of vok"
    assert captions.check_nonce_template("f", template)
    assert not captions.check_nonce_template("f", "a photo of {nonce}")
    for bad in ("a photo", "{concept} {nonce}", "{nonce.x}", "{nonce"):
        with pytest.raises(UserError, match="f=.*must have {nonce}"):
            captions.check_nonce_template("f", bad)


def test_word_lists_name_real_concepts(pictures):
    lists = captions.NO_FLIP | captions._PLURAL | captions._BARE
    assert lists <= set(pictures.concepts)
    assert not captions.may_flip("stop sign")
    assert captions.may_flip("owl")


def test_templates_are_the_words_that_the_embedded_models_learned():
    """Another word would change the judge's numbers and what emoji-sd was taught."""
    text = repr(
        (captions.TEMPLATES, captions.CONCEPT_TEMPLATES, captions.STYLE_TEMPLATES)
    )
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest[:12] == "8555247bf2a1"
