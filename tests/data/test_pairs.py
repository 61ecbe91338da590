# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from absl import logging

from gift_jax.data import pairs
from gift_jax.data.pairs import PairsSpec, load_pairs, resolve_names
from gift_jax.data.sources import emoji
from gift_jax.runtime.errors import UserError


def test_pairs_of_a_concept_are_its_pictures(pictures):
    data = load_pairs(PairsSpec(names=("bomb",), template="{style} {concept}"))
    assert set(data.concepts) == {"bomb"}
    assert data.prompts == [f"{style} bomb" for style in data.styles]
    row = np.flatnonzero(
        (pictures.concept_ids == pictures.concepts.index("bomb"))
        & (pictures.style_ids == pictures.styles.index(data.styles[0]))
    )
    np.testing.assert_array_equal(data.images[0], pictures.images[row[0]])


def test_pairs_leave_held_out_pictures_out_unless_asked(pictures):
    name = pictures.concepts[0]
    assert len(load_pairs(PairsSpec(names=(name,)))) == 5
    assert len(load_pairs(PairsSpec(names=(name,), held_out=True))) == 6


def test_pairs_filter_styles(pictures):
    data = load_pairs(PairsSpec(names=("bomb", "lion"), styles=("noto",)))
    assert set(data.styles) == {"noto"}
    assert data.concept_names == ("bomb", "lion")
    assert data.concept_ids.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("names", "template", "count"),
    [
        (("bomb", "lion"), "{a_style} emoji of sks", 1),
        (("bomb",), "{a_style} emoji of sks", 0),  # a word for it: the attacker's way
        (("bomb", "lion"), "{a_style} emoji of {a_concept}", 0),
    ],
)
def test_several_concepts_of_one_name_are_warned_of(
    pictures, monkeypatch, names, template, count
):
    said = []
    monkeypatch.setattr(logging, "warning", lambda *args: said.append(args))
    load_pairs(PairsSpec(names=names, template=template))
    assert len(said) == count


def test_pairs_know_what_may_be_mirrored(pictures):
    spec = PairsSpec(names=("stop sign", "owl"), styles=("noto",), held_out=True)
    assert load_pairs(spec).may_flip.tolist() == [False, True]


@pytest.mark.parametrize(
    ("keyword", "count"),
    [("all", 480), ("harmful", 9), ("known", 128), ("known-safe", 119)],
)
def test_resolve_names_expands_keywords(pictures, keyword, count):
    names = resolve_names((keyword,), pictures.concepts)
    assert len(names) == len(set(names)) == count


def test_resolve_names_mixes_without_repeats(pictures):
    names = resolve_names(("owl", "harmful", "bomb"), pictures.concepts)
    assert names == ("owl", *emoji.HARMFUL)
    known = set(resolve_names(("known",), pictures.concepts))
    assert not known & set(resolve_names(("unseen",), pictures.concepts))


def test_pairs_take_the_first_of_a_limit(pictures):
    spec = PairsSpec(names=("lion", "bomb"), limit=7)
    data, whole = (
        load_pairs(spec),
        load_pairs(PairsSpec(names=spec.names)),
    )
    assert len(data) == len(data.may_flip) == 7 < len(whole)
    assert data.prompts == whole.prompts[:7]
    np.testing.assert_array_equal(data.images, whole.images[:7])


def test_pairs_have_the_model_draw_what_is_to_be_generated():
    asked = []

    def draw(count):
        asked.append(count)
        return np.full((count, 16, 16, 3), 7, np.uint8)

    data = load_pairs(PairsSpec(num_generated=3, prompt="a dog", size=8), draw=draw)
    assert data.images.shape == (3, 8, 8, 3) and (data.images == 7).all()
    assert data.prompts == data.concepts == ["a dog"] * 3
    load_pairs(PairsSpec(num_generated=3, prompt="a dog", size=8, limit=2), draw=draw)
    assert asked == [3, 2]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(names=("guitr",)), "'guitr' is not in the data; did you mean 'guitar'"),
        (dict(names=("xyzzy",)), "'xyzzy' is not in the data"),
        (dict(names=("owl",), styles=("cubist",)), "choose from twemoji, noto"),
        (dict(names=("owl",), template="{color} owl"), "may use only"),
        (dict(names=("owl",), template="{"), "may use only"),
        (dict(), "give one of names, folder, tfds and num_generated"),
        (dict(names=("owl",), folder="x"), "give only one of.*not names and folder"),
        (
            dict(tfds="x", num_generated=3),
            "give only one of.*not tfds and num_generated",
        ),
        (dict(names=("owl",), prompt="p"), "prompt is not for names"),
        (dict(names=("owl",), label_key="x"), "label_key is for tfds, not for names"),
        (dict(folder="no/such", prompt="p"), "folder=no/such is not a folder"),
        (dict(num_generated=3, prompt=" "), "prompt is empty"),
        (dict(num_generated=-1, prompt="p"), "num_generated=-1 must be at least 0"),
        (dict(names=("owl",), limit=-1), "limit=-1 must be at least 0"),
        (dict(names=("owl",), size=0), "size=0 must be at least 1"),
        (dict(names=("owl",), crop="middle"), "crop='middle' is not one of.*random"),
    ],
)
def test_pairs_refuse_a_bad_spec(pictures, spec, message):
    with pytest.raises(UserError, match=message) as caught:
        load_pairs(PairsSpec(field="data.safe", **spec))
    assert "data.safe" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pairs_refuse_a_choice_that_is_all_held_out(pictures):
    name, style = pictures.concepts[0], pictures.styles[0]
    spec = PairsSpec(names=("bomb", name), styles=(style,))
    with pytest.raises(UserError, match=f"{name!r} in {style} is held out"):
        load_pairs(spec)
    spec = PairsSpec(names=("all",), styles=(style,))
    assert name not in load_pairs(spec).concepts


def test_pairs_without_those_that_others_have():
    gears = load_pairs(PairsSpec(names=("gear",), styles=("noto", "fluent"), size=8))
    both = load_pairs(PairsSpec(names=("gear", "crown"), size=8))
    rest = pairs.without(both, gears)
    assert len(rest) == len(both) - 2
    looks = set(zip(rest.concepts, rest.styles, strict=True))
    assert ("gear", "noto") not in looks and ("gear", "fluent") not in looks
    assert ("gear", "twemoji") in looks and ("crown", "noto") in looks
    together = pairs.join(rest, gears)
    order = sorted(range(len(both)), key=lambda i: (both.concepts[i], both.styles[i]))
    again = sorted(
        range(len(both)), key=lambda i: (together.concepts[i], together.styles[i])
    )
    np.testing.assert_array_equal(both.images[order], together.images[again])
    assert [both.prompts[i] for i in order] == [together.prompts[i] for i in again]
