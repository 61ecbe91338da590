# SPDX-License-Identifier: Apache-2.0
"""The layouts that people's folders of images have: read as meant, or one line."""

import io
import json
import sys
import types
import zlib

import jax
import numpy as np
import pytest
from absl import logging
from PIL import Image, ImageFile, PngImagePlugin

from gift_jax.data.cache import DataGroup, augment_prompts
from gift_jax.data.images import read_image
from gift_jax.data.pairs import PairsSpec, check_pairs, load_pairs
from gift_jax.runtime.errors import UserError


@pytest.fixture
def logged(monkeypatch):
    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(logging, level, lambda text, *a: lines.append(text % a))
    return lines


@pytest.fixture
def make(tmp_path):
    """Writes files: images, each of its own gray, or texts; returns the folder."""

    def call(*images, **texts):
        for i, name in enumerate(images):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (10 * i,) * 3).save(tmp_path / name)
        return write(**texts)

    def write(**texts):
        for name, text in texts.items():
            name = name.replace("__", "/").replace("_dot_", ".").replace("_of_", " ")
            (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path

    return call


def load(folder, **fields):
    return load_pairs(PairsSpec(folder=str(folder), size=4, **fields))


def grays(data):
    return (data.images[:, 0, 0, 0] // 10).tolist()


def refused(message, folder, **fields):
    """Before an image is opened, unless captions must be read for it."""
    spec = PairsSpec(folder=str(folder), size=4, field="config.data", **fields)
    with pytest.raises(UserError, match=message) as caught:
        check_pairs(spec)
        load_pairs(spec)
    assert "\n" not in str(caught.value)


# --- text files beside images ---------------------------------------------------------


def test_text_files_beside_images_are_their_captions(make, logged):
    folder = make("b.png", "a.png", "c.jpg", a_dot_txt="a dog, \"big\" [x]\n",
                  b_dot_txt="\ufeffein Käse", c_dot_caption="c")  # fmt: skip
    data = load(folder)
    assert data.prompts == ['a dog, "big" [x]', "ein Käse", "c"]
    assert grays(data) == [1, 0, 2]
    assert any("3 of 3 images have a caption in a text file" in x for x in logged)
    data = load(folder, prompt="p")
    assert data.prompts == ["p"] * 3
    assert any("the prompt given replaces all captions" in line for line in logged)
    assert load(folder, limit=1).prompts == ['a dog, "big" [x]']


def test_text_files_that_are_not_whole_are_refused(make):
    folder = make("a.png", "b.png", a_dot_txt="x")
    refused(r"b.png has no caption, .* write b.txt, or set config.data.prompt", folder)
    make(b_dot_txt=" \n")
    refused(r"b.txt is empty; write the image's caption", folder)
    (folder / "b.txt").write_bytes(b"caf\xe9")
    refused("b.txt cannot be read as UTF-8", folder)
    make(b_dot_txt="x", b_dot_caption="y")
    refused("has b.txt and b.caption; an image must have one", folder)
    (folder / "b.caption").unlink()
    (folder / "b.txt").unlink()
    (folder / "b.txt").symlink_to("/etc/hostname")
    refused("b.txt is a link out of the folder", folder)


def test_captions_may_be_optional(make):
    folder = make("a.png", "b.png")
    refused("config.data.prompt is empty; a folder without metadata", folder)
    assert load(folder, captions_optional=True).prompts == ["", ""]
    make(a_dot_txt="x")
    refused("b.png has no caption", folder, captions_optional=True)
    make(b_dot_txt="y")
    assert load(folder, captions_optional=True).prompts == ["x", "y"]


# --- kohya's folders ------------------------------------------------------------------


def test_kohya_folders_give_repeats_and_prompts(make):
    folder = make("10_sks dog/0.png", "10_sks dog/1.png", "20_a cat, 4k/2.png",
                  **{"10_sks_of_dog__1_dot_txt": "a dog runs"})  # fmt: skip
    data = load(folder)
    assert data.prompts == ["sks dog", "a dog runs", "a cat, 4k", "a cat, 4k"]
    assert grays(data) == [0, 1, 2, 2]
    assert load(folder, prompt="p").prompts == ["p"] * 4
    assert load(folder / "10_sks dog").prompts == ["sks dog", "a dog runs"]
    (folder / "20_a cat, 4k").rename(folder / "0_none")
    refused(
        "0_none: its repeats must be from 1 to 1000; rename it, as '10_none'", folder
    )
    (folder / "0_none").rename(folder / ("9" * 99 + "_none"))
    refused("its repeats must be from 1 to 1000", folder)


# --- several captions -----------------------------------------------------------------


def test_an_image_may_have_several_captions(make, logged):
    rows = [("a.png", ["x", "y"]), ("b.png", "b"), ("a.png", "z")]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    folder = make("a.png", "b.png", metadata_dot_jsonl="\n".join(lines))
    data = load(folder)
    assert data.captions == [("x", "y", "z"), ("b",)] and grays(data) == [0, 1]
    assert data.prompts == ["x", "b"] and data.every_caption == ["x", "y", "z", "b"]
    group = DataGroup(augmented_copies=3)
    drawn = [augment_prompts(data, group, jax.random.key(i)) for i in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len({prompts[0] for prompts in drawn}) > 1
    for prompts in drawn:
        assert set(prompts[::2]) == {"x", "y", "z"} and set(prompts[1::2]) == {"b"}
    assert any("up to 3 captions; each of augmented_copies=3" in x for x in logged)
    assert load(folder, prompt="p").captions == [("p",), ("p",)]
    make(metadata_dot_jsonl="\n".join([lines[0], lines[0]]))
    refused("line 2: 'x' is the image's caption on line 1 too; remove", folder)
    make(metadata_dot_jsonl='{"file_name": "a.png", "text": []}')
    refused("line 1: text is empty", folder)
    make(metadata_dot_jsonl='{"file_name": "a.png", "text": ["a", 5]}')
    refused("line 1: text=5 must be text", folder)
    (folder / "metadata.jsonl").unlink()
    make(a_dot_txt="1\n\n2\n", b_dot_txt="3")
    assert load(folder).captions == [("1", "2"), ("3",)]


def test_captions_keep_every_character(make):
    texts = ["a, b", "[x]", 'say "y"', "two\nlines", "(z:1.3)", "'", "{a}", "猫、犬"]
    names = [f"{i}.png" for i in range(len(texts))]
    rows = zip(names, texts, strict=True)
    lines = [json.dumps({"file_name": n, "text": t}) for n, t in rows]
    folder = make(*names, metadata_dot_jsonl="\n".join(lines))
    assert load(folder).prompts == texts
    (folder / "metadata.jsonl").unlink()
    rows = [
        '{},"{}"'.format(n, t.replace('"', '""'))
        for n, t in zip(names, texts, strict=True)
    ]
    make(metadata_dot_csv="\n".join(["file_name,text", *rows]))
    assert load(folder).prompts == texts
    assert load(folder, prompt=texts[3]).prompts == [texts[3]] * len(texts)


# --- metadata one level down, or in another form --------------------------------------

ROW = '{"file_name": "a.png", "text": "x"}\n'


def test_metadata_one_level_down_is_read_and_said(make, logged):
    folder = make("train/a.png", "test/a.png", train__metadata_dot_jsonl=ROW)
    assert load(folder).prompts == ["x"]
    assert any("reads train/metadata.jsonl, nothing of test" in line for line in logged)
    make(test__metadata_dot_jsonl=ROW.replace('"x"', '"y"'))
    assert load(folder).prompts == ["x"]  # data.split
    assert load(folder, split="test").prompts == ["y"]
    refused("has metadata in test, train; set config.data.split to", folder, split="a")


@pytest.mark.parametrize(
    "name",
    ["metadata.json", "metadata.parquet", "Metadata.csv", "metadata.jsonl.bak"]
    + ["captions.txt", "caption.json", "prompts.txt", "metadata (1).csv", "METADATA"],
)
@pytest.mark.parametrize("prompt", ["", "p"])
def test_captions_in_another_form_are_refused(make, name, prompt):
    folder = make("a.png")
    (folder / name).write_text("[]")
    shown = name.replace(".", r"\.").replace("(", r"\(").replace(")", r"\)")
    forms = "write metadata.csv or metadata.jsonl .* or a .txt beside each image"
    refused(f"{shown} looks like captions in a form .*; {forms}", folder, prompt=prompt)
    if name != "metadata.jsonl.bak":
        make(metadata_dot_jsonl=ROW)
        refused("looks like captions in a form", folder, prompt=prompt)


def test_what_may_be_captions_is_never_ignored_in_silence(make, logged):
    folder = make("a.png", "1_dog/b.png", "c/d.png", c__metadata_dot_jsonl=ROW,
                  labels_dot_csv="x", z_dot_txt="x", LICENSE="x")  # fmt: skip
    refused("prompt is empty; .*1_dog is none of these. needs one prompt", folder)
    assert load(folder, prompt="p").prompts == ["p"]
    (line,) = [line for line in logged if "maybe captions" in line]
    assert "1_dog, c, labels.csv ..." in line
    assert any("ignored 1 that are not images: LICENSE" in line for line in logged)


def test_images_one_level_down_are_pointed_out(make):
    folder = make("cats/a.png", "dogs/b.png")
    path = str(folder / "cats")
    refused(f'has no images, but its folders have: {path}; .*"{path}", "', folder)


# --- several folders ------------------------------------------------------------------


def test_several_folders_each_with_its_prompt(make):
    root = make("a/a.png", "b, c/b.png", "d/c.png", d__c_dot_txt="the caption")
    names = [str(root / name) for name in ("a", "b, c", "d")]
    folder = json.dumps(names)
    data = load(folder, prompt=json.dumps(["a [dog], big", 'a "cat"', ""]))
    assert data.prompts == ["a [dog], big", 'a "cat"', "the caption"]
    assert grays(data) == [0, 1, 2]
    assert load(folder, prompt="p, q").prompts == ["p, q"] * 3
    assert load(folder, prompt="p", limit=2).prompts == ["p"] * 2
    refused("prompt='.* must be one prompt for all 3 folders", folder, prompt='["a"]')
    refused("prompt='.* must be one prompt for all 3 folders", folder, prompt='["a", ')
    refused("a is not a folder", json.dumps(["nowhere/a", names[0]]), prompt="p")
    refused(
        "lists .* twice; remove", json.dumps([names[0], names[0] + "/"]), prompt="p"
    )
    refused("is not a folder$", '["a"', prompt="p")
    both = f"{names[0]},{names[2]}"
    refused('is not a folder; give several as \'\\["A", "B"\\]\'', both, prompt="p")
    refused("prompt is empty", folder)


def test_a_folder_whose_name_is_a_list_is_one(make, monkeypatch):
    monkeypatch.chdir(make('["a"]/a.png'))
    assert load('["a"]', prompt='["p", "q"]').prompts == ['["p", "q"]']


# --- images that Pillow alone does not read -------------------------------------------

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


def test_heic_names_what_reads_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if not installed
    message = r"a.heic .*HEIC, which needs pillow-heif.; pip install pillow-heif, or"
    for brand in (b"heic", b"mif1", b"heix"):
        file = io.BytesIO(HEIC.replace(b"ftypheic", b"ftyp" + brand))
        with pytest.raises(UserError, match=message):
            read_image(file, 4, name="a.heic")


def test_heic_is_read_where_pillow_heif_is(monkeypatch):
    class HeifFile(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._mode, self._size, self.tile = "RGB", (4, 4), []

        def load(self):
            self.im = Image.new("RGB", (4, 4), (7, 8, 9)).im
            return Image.Image.load(self)

    def register():
        Image.register_open("HEIF", HeifFile, lambda head: head[4:12] == b"ftypheic")
        Image.register_extension("HEIF", ".heic")

    heif = types.SimpleNamespace(register_heif_opener=register)
    monkeypatch.setitem(sys.modules, "pillow_heif", heif)
    try:
        assert (read_image(io.BytesIO(HEIC), 4) == (7, 8, 9)).all()
    finally:
        Image.OPEN.pop("HEIF")
        Image.EXTENSION.pop(".heic")
        Image.ID.remove("HEIF")


def chunk(kind, data):
    size, check = len(data).to_bytes(4, "big"), zlib.crc32(kind + data)
    return size + kind + data + check.to_bytes(4, "big")


@pytest.mark.parametrize("kind", ["iTXt", "zTXt", "tEXt"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_png_with_much_text_is_read(kind, place, tmp_path):
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    text = b"x" * (PngImagePlugin.MAX_TEXT_CHUNK + 200_000)
    heads = {"iTXt": b"workflow\0\1\0\0\0", "zTXt": b"workflow\0\0", "tEXt": b"w\0"}
    body = text if kind == "tEXt" else zlib.compress(text)
    data = file.getvalue()
    end = {"before": 33, "after": len(data) - 12}[place]  # of IHDR; IEND
    data = data[:end] + chunk(kind.encode(), heads[kind] + body) + data[end:]
    if kind != "tEXt":  # which Pillow does not limit
        with pytest.raises(ValueError, match="too large"):
            Image.open(io.BytesIO(data)).load()
    (tmp_path / "a.png").write_bytes(data)
    for source in (io.BytesIO(data), tmp_path / "a.png"):
        np.testing.assert_array_equal(read_image(source, 4), pixels)


def test_png_text_may_still_say_which_way_is_up():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="3"/>')
    info.add_text("workflow", "y" * 99)
    Image.fromarray(pixels).save(file, "PNG", pnginfo=info)
    file.seek(0)
    np.testing.assert_array_equal(read_image(file, 4), pixels[::-1, ::-1])
