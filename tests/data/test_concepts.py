# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from PIL import Image

from gift_jax.config import UserError
from gift_jax.data import emoji
from gift_jax.data.concepts import ConceptSpec, pairs, resolve_names


def test_pairs_of_a_concept_are_its_pictures(pictures):
    data = pairs(ConceptSpec(names=("bomb",), template="{style} {concept}"), pictures)
    assert set(data.concepts) == {"bomb"}
    assert data.prompts == [f"{style} bomb" for style in data.styles]
    row = np.flatnonzero(
        (pictures.concept_ids == pictures.concepts.index("bomb"))
        & (pictures.style_ids == pictures.styles.index(data.styles[0]))
    )
    np.testing.assert_array_equal(data.images[0], pictures.images[row[0]])


def test_pairs_leave_held_out_pictures_out_unless_asked(pictures):
    name = pictures.concepts[0]
    assert len(pairs(ConceptSpec(names=(name,)), pictures)) == 5
    assert len(pairs(ConceptSpec(names=(name,), held_out=True), pictures)) == 6


def test_pairs_filter_styles(pictures):
    data = pairs(ConceptSpec(names=("bomb", "lion"), styles=("noto",)), pictures)
    assert set(data.styles) == {"noto"}
    assert data.concept_names == ("bomb", "lion")
    assert data.concept_ids.tolist() == [0, 1]


def test_pairs_know_what_may_be_mirrored(pictures):
    spec = ConceptSpec(names=("stop sign", "owl"), styles=("noto",), held_out=True)
    assert pairs(spec, pictures).may_flip.tolist() == [False, True]


@pytest.mark.parametrize(
    ("keyword", "count"),
    [("all", 480), ("forbidden", 9), ("known", 128), ("known-safe", 119)],
)
def test_resolve_names_expands_keywords(pictures, keyword, count):
    names = resolve_names((keyword,), pictures.concepts)
    assert len(names) == len(set(names)) == count


def test_resolve_names_mixes_without_repeats(pictures):
    names = resolve_names(("owl", "forbidden", "bomb"), pictures.concepts)
    assert names == ("owl", *emoji.FORBIDDEN)
    known = set(resolve_names(("known",), pictures.concepts))
    assert not known & set(resolve_names(("unseen",), pictures.concepts))


def test_pairs_read_a_folder_upright_cropped_and_over_white(tmp_path):
    wide = np.zeros((8, 16, 4), np.uint8)
    wide[:, 4:12] = (200, 0, 0, 255)  # the middle square; the sides are transparent
    Image.fromarray(wide).save(tmp_path / "b.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / ".hidden").write_text("not a picture")
    data = pairs(ConceptSpec(folder=str(tmp_path), prompt="sks thing", size=8))
    assert data.images.shape == (2, 8, 8, 3)
    assert (data.images[0] == 255).all()
    assert (data.images[1] == (200, 0, 0)).all()
    assert data.prompts == ["sks thing"] * 2


def test_pairs_turn_pictures_as_their_camera_says(tmp_path):
    half = np.zeros((8, 8, 3), np.uint8)
    half[:4] = 255  # white above black
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    Image.fromarray(half).save(tmp_path / "a.png", exif=exif)
    (image,) = pairs(ConceptSpec(folder=str(tmp_path), prompt="p", size=8)).images
    assert (image[:4] == 0).all() and (image[4:] == 255).all()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(names=("guitr",)), "'guitr' is not in the data; did you mean 'guitar'"),
        (dict(names=("xyzzy",)), "'xyzzy' is not in the data"),
        (dict(names=("owl",), styles=("cubist",)), "choose from twemoji, noto"),
        (dict(names=("owl",), template="{colour} owl"), "may use only"),
        (dict(names=("owl",), template="{"), "may use only"),
        (dict(), "give one of names and folder"),
        (dict(names=("owl",), folder="x"), "give only one of"),
        (dict(folder="no/such", prompt="p"), "folder=no/such is not a folder"),
        (dict(folder="no/such"), "prompt is empty"),
    ],
)
def test_pairs_refuse_a_bad_spec(pictures, spec, message):
    with pytest.raises(UserError, match=message) as caught:
        pairs(ConceptSpec(field="data.safe", **spec), pictures)
    assert "data.safe" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pairs_refuse_a_choice_that_is_all_held_out(pictures):
    name, style = pictures.concepts[0], pictures.styles[0]
    spec = ConceptSpec(names=("bomb", name), styles=(style,))
    with pytest.raises(UserError, match=f"{name!r} in {style} is held out"):
        pairs(spec, pictures)
    spec = ConceptSpec(names=("all",), styles=(style,))
    assert name not in pairs(spec, pictures).concepts


def test_pairs_refuse_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match="has no pictures"):
        pairs(ConceptSpec(folder=str(tmp_path), prompt="p"))


def test_pairs_refuse_an_unreadable_picture_by_name(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut.png cannot be read as a picture"):
        pairs(ConceptSpec(folder=str(tmp_path), prompt="p"))
    (tmp_path / "cut.png").unlink()
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="notes.txt cannot be read"):
        pairs(ConceptSpec(folder=str(tmp_path), prompt="p"))
