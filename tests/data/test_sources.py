# SPDX-License-Identifier: Apache-2.0
"""Pictures from folders, from metadata files and from prepared TFDS datasets."""

import io
import json
import re
import shutil
import sys

import numpy as np
import pytest
from absl import logging
from PIL import Image

from gift_jax.data.images import read_image
from gift_jax.data.pairs import PairsSpec, load_pairs
from gift_jax.runtime.errors import UserError

RED, BLUE = (200, 0, 0), (0, 0, 200)


def save(path, color=RED, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def spec(folder, **fields):
    fields = {"size": 8, "field": "config.safe"} | fields
    return PairsSpec(folder=str(folder), **fields)


def refused(spec, match):
    with pytest.raises(UserError, match=match) as caught:
        load_pairs(spec)
    assert "config.safe" in str(caught.value) or ".png" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def logged(monkeypatch):
    """The lines logged at level INFO."""
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *args: lines.append(text % args))
    return lines


# --- one image ----------------------------------------------------------------------


def stored(image, name="a.png", **how):
    """The image as a file in memory."""
    file = io.BytesIO()
    image.save(file, format=Image.registered_extensions()[f".{name[-3:]}"], **how)
    return io.BytesIO(file.getvalue())


def test_images_are_over_white():
    wide = np.zeros((8, 16, 4), np.uint8)
    wide[:, 4:12] = (*RED, 255)  # the middle square; the sides are transparent
    image = read_image(stored(Image.fromarray(wide)), 8)
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8
    assert (image == RED).all()
    assert (read_image(stored(Image.new("RGBA", (8, 8))), 8) == 255).all()


def test_images_are_upright():
    half = np.zeros((8, 8, 3), np.uint8)
    half[:4] = 255  # white above black
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    image = read_image(stored(Image.fromarray(half), exif=exif), 8)
    assert (image[:4] == 0).all() and (image[4:] == 255).all()


def test_sixteen_bit_gray_keeps_its_range():
    values = np.tile(np.arange(0, 65536, 257, dtype=np.uint16), (256, 1))
    expected = np.tile(np.arange(256), (256, 1))
    for name in ("a.png", "a.tif", "a.ppm"):
        image = read_image(stored(Image.fromarray(values), name), 256)
        np.testing.assert_array_equal(image, np.stack([expected] * 3, -1), name)
    image = Image.fromarray(values)
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = read_image(stored(image, exif=exif), 256)
    np.testing.assert_array_equal(turned[..., 0], expected[:, ::-1])


def test_palette_gray_alpha_and_cmyk_give_their_colors():
    see_through = Image.new("P", (8, 8), 1)
    see_through.putpalette([*RED, *BLUE])
    assert (read_image(stored(see_through), 8) == BLUE).all()
    assert (read_image(stored(see_through, transparency=1), 8) == 255).all()
    assert (read_image(stored(Image.new("LA", (8, 8), (90, 255))), 8) == 90).all()
    assert (read_image(stored(Image.new("LA", (8, 8), (90, 0))), 8) == 255).all()
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    image = read_image(stored(cmyk, "a.jpg", quality=100), 8).astype(int)
    assert np.abs(image - (255, 0, 0)).max() <= 3
    assert (read_image(stored(Image.new("1", (8, 8), 1)), 8) == 255).all()


def test_an_animation_counts_as_its_first_frame():
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
    file = stored(frames[0], "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(file) as image:
        assert image.n_frames == 2
    assert (read_image(file, 8) == RED).all()


def test_tiny_and_narrow_images_are_enlarged():
    for shape in ((1, 1), (1, 300), (300, 1)):
        image = read_image(stored(Image.new("RGB", shape, RED)), 8)
        assert image.shape == (8, 8, 3) and (image == RED).all()


def test_crops_take_the_middle_a_place_or_the_whole():
    ramp = np.zeros((16, 64, 3), np.uint8)
    ramp[:] = np.arange(64)[None, :, None] * 4
    file = stored(Image.fromarray(ramp))
    middle, whole = (read_image(file, 16, crop=crop) for crop in ("center", "none"))
    np.testing.assert_array_equal(middle, ramp[:, 24:40])
    assert whole.shape == (16, 16, 3)
    assert whole[0, 0, 0] < 12 and whole[0, -1, 0] > 240
    places = set()
    for seed in range(20):
        crops = [
            read_image(file, 16, crop="random", rng=np.random.default_rng(seed))
            for _ in range(2)
        ]
        np.testing.assert_array_equal(*crops)
        steps = np.diff(crops[0][0, 1:-1, 0].astype(int))
        assert set(steps) <= {3, 4, 5}  # the aspect is kept
        places.add(int(crops[0][0, 8, 0]))
    assert len(places) > 10 and min(places) < 80 and max(places) > 160


def test_random_crops_depend_on_seed_and_image(tmp_path):
    ramp = np.zeros((8, 64, 3), np.uint8)
    ramp[:] = np.arange(64)[None, :, None] * 4
    for name in "abc":
        Image.fromarray(ramp).save(tmp_path / f"{name}.png")
    random = dict(prompt="p", crop="random")
    first = load_pairs(spec(tmp_path, **random)).images
    np.testing.assert_array_equal(first, load_pairs(spec(tmp_path, **random)).images)
    np.testing.assert_array_equal(
        first[:2], load_pairs(spec(tmp_path, **random, limit=2)).images
    )
    assert len(np.unique(first, axis=0)) == 3
    assert (first != load_pairs(spec(tmp_path, **random, seed=1)).images).any()


def test_huge_images_are_refused(monkeypatch):
    file = stored(Image.new("RGB", (30, 30), RED))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert (read_image(file, 8) == RED).all()  # where Pillow would only warn
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(UserError, match=r"huge.png cannot be read .*exceeds limit"):
        read_image(file, 8, name="huge.png")


@pytest.mark.parametrize("pixels", [np.float32, np.int32])
def test_pixels_without_a_range_are_refused(pixels):
    file = stored(Image.fromarray(np.full((8, 8), 1e5, pixels)), "a.tif")
    with pytest.raises(UserError, match="have no agreed range; save it with 8 bits"):
        read_image(file, 8)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.tif", "a.bmp", "a.ppm"])
def test_damaged_images_are_refused(name, rng):
    pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
    whole = stored(Image.fromarray(pixels), name).getvalue()
    for size in (0, 1, 10, len(whole) // 2):
        with pytest.raises(UserError, match=f"{name} cannot be read as an image"):
            read_image(io.BytesIO(whole[:size]), 8, name=name)


# --- a folder and one prompt ----------------------------------------------------------


def test_folder_gives_its_images_sorted_and_ignores_the_rest(tmp_path, logged):
    save(tmp_path / "b.png", BLUE)
    save(tmp_path / "a.JPG", RED)
    save(tmp_path / "sub" / "c.png")
    for name in ("a.cfg", "LICENSE", ".hidden.png"):
        (tmp_path / name).write_text("not an image")
    data = load_pairs(spec(tmp_path, prompt="sks thing"))
    assert data.images.shape == (2, 8, 8, 3)
    assert (data.images[1] == BLUE).all() and (data.images[0] != BLUE).any()
    assert data.prompts == data.concepts == ["sks thing"] * 2
    assert data.may_flip.tolist() == [True] * 2
    (line,) = (line for line in logged if "ignored" in line)
    assert "ignored 3" in line and "a.cfg" in line
    assert (
        load_pairs(spec(tmp_path, prompt="p", limit=1)).images == data.images[:1]
    ).all()


def test_folder_without_images_is_refused(tmp_path):
    refused(spec(tmp_path, prompt="p"), "has no images")
    (tmp_path / "notes.txt").write_text("hello")
    refused(spec(tmp_path, prompt="p"), "has no images")
    save(tmp_path / "a.png")
    refused(spec(tmp_path, prompt=" "), "prompt is empty; a folder without metadata")
    (tmp_path / "cut.png").write_bytes(b"")
    refused(spec(tmp_path, prompt="p"), "cut.png cannot be read as an image .of no k")


# --- a folder and its metadata --------------------------------------------------------


@pytest.fixture
def captioned(tmp_path):
    """A folder of two images; write(text or rows, name) gives it metadata."""
    save(tmp_path / "train" / "a.png", RED)
    save(tmp_path / "b.png", BLUE)

    def write(content, name="metadata.csv"):
        if not isinstance(content, str):
            content = "".join(json.dumps(row) + "\n" for row in content)
            name = "metadata.jsonl"
        (tmp_path / name).write_text(content, encoding="utf-8")
        return tmp_path

    return write


GOOD = 'file_name,text\nb.png,"a blue, flat thing"\ntrain/a.png,a red thing\n'


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        "\ufeff" + GOOD.replace("\n", "\r\n"),
        [
            {"file_name": "b.png", "text": "a blue, flat thing", "id": 3},
            {"file_name": "./train/a.png", "text": "a red thing"},
        ],
    ],
)
def test_metadata_captions_its_images_in_its_order(captioned, content):
    data = load_pairs(spec(captioned(content)))
    assert data.prompts == data.concepts == ["a blue, flat thing", "a red thing"]
    assert (data.images[0] == BLUE).all() and (data.images[1] == RED).all()
    one = load_pairs(spec(captioned(content), limit=1))
    assert one.prompts == ["a blue, flat thing"] and len(one.images) == 1


def test_metadata_may_name_another_column(captioned):
    folder = captioned("caption,file_name,text\nblue,b.png,wrong\n")
    assert load_pairs(spec(folder, caption_column="caption")).prompts == ["blue"]
    refused(
        spec(folder, caption_column="title"),
        r"metadata.csv, line 2: no column 'title' among 'caption', 'file_name', 'text'",
    )


def test_prompt_replaces_captions_and_the_log_says_so(captioned, logged):
    assert load_pairs(spec(captioned(GOOD))).prompts[0].startswith("a blue")
    assert not any("prompt given" in line for line in logged)
    assert load_pairs(spec(captioned(GOOD), prompt="p")).prompts == ["p", "p"]
    assert any("prompt given replaces all captions" in line for line in logged)
    folder = captioned("file_name\nb.png\n")
    assert load_pairs(spec(folder, prompt="p")).prompts == ["p"]


def test_images_that_metadata_leaves_out_are_logged(captioned, logged):
    load_pairs(spec(captioned(GOOD)))
    assert not any("lists" in line for line in logged)
    load_pairs(spec(captioned("file_name,text\nb.png,blue\n")))
    assert any("metadata.csv lists 1 of 2 images" in line for line in logged)


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "metadata.csv lists no images"),
        ("file_name,text\n", "metadata.csv lists no images"),
        ([], "metadata.jsonl lists no images"),
        ("name,text\nb.png,x\n", "line 2: no column 'file_name' among 'name', 'text'"),
        ([{"file_name": "b.png"}], "line 1: no column 'text' among 'file_name'; add"),
        ("file_name,text\nb.png,\n", "line 2: text is empty"),
        ("file_name,text\nb.png\n", "line 2: text is empty"),
        ([{"file_name": "b.png", "text": " "}], "line 1: text is empty"),
        ([{"file_name": "b.png", "text": None}], "line 1: text is empty"),
        ([{"file_name": "b.png", "text": 3}], "line 1: text=3 must be text"),
        ("file_name,text\n,x\n", "line 2: file_name is empty"),
        ("file_name,text\nc.png,x\n", "line 2: file_name='c.png' is no file in"),
        ("file_name,text\ntrain,x\n", "line 2: file_name='train' is no file in"),
        ([{"file_name": "a\0.png", "text": "x"}], "line 1: file_name=.* is no file"),
        ([{"file_name": "x" * 999, "text": "x"}], "line 1: file_name=.* is no file"),
        ("file_name,text\n../b.png,x\n", "line 2: file_name='../b.png' must stay"),
        ("file_name,text\ntrain/../b.png,x\n", "line 2: file_name=.* must stay inside"),
        ("file_name,text\n/etc/hosts,x\n", "line 2: file_name='/etc/hosts' must stay"),
        (
            "file_name,text\nb.png,x\n./b.png,x\n",
            "line 3: 'x' is the image's caption on line 2 too",
        ),
        ("file_name,text\nb.png,a dog, sitting\n", "line 2: more values than.*quote"),
        ('file_name,text\nb.png,"a dog\n', "line [23]: malformed CSV"),
        ('{"file_name": "b.png", "text": "x"}\n\n{"file', "line 3: malformed JSON"),
        ("[1]\n", "line 1: must be a JSON object"),
    ],
)
def test_bad_metadata_is_refused_by_file_and_line(captioned, content, message):
    name = "metadata.csv"
    if isinstance(content, str) and content.startswith(("{", "[")):
        name = "metadata.jsonl"
    folder = captioned(content, name)
    refused(spec(folder), f"config.safe.folder: {re.escape(str(folder))}.*{message}")


def test_metadata_must_be_one_file_of_text(captioned):
    captioned(GOOD)
    folder = captioned([{"file_name": "b.png", "text": "x"}])
    refused(spec(folder), "has both metadata.csv and metadata.jsonl")
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_bytes(b"file_name,text\nb.png,caf\xe9\n")
    refused(spec(folder), "metadata.csv cannot be read as UTF-8")


def test_links_may_lead_about_the_folder_but_not_out(captioned, tmp_path_factory):
    outside = save(tmp_path_factory.mktemp("outside") / "c.png")
    folder = captioned("file_name,text\nlink.png,x\n")
    (folder / "link.png").symlink_to(folder / "b.png")
    assert (load_pairs(spec(folder)).images == BLUE).all()
    (folder / "link.png").unlink()
    (folder / "link.png").symlink_to(outside)
    refused(spec(folder), "line 2: file_name='link.png' must stay inside")
    (folder / "link.png").unlink()
    (folder / "link.png").symlink_to("link.png")
    refused(spec(folder), "line 2: file_name='link.png' is no file")


# --- prepared datasets ----------------------------------------------------------------

COLORS = [(i * 60, 0, 0) for i in range(4)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data folder with tiny_things:1.0.0; its old_ and float_things will not do."""
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 4), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["tiger_cat", "owl"]),
            "text": tfds.features.Text(),
        }
    )

    def example(i, label):
        file = stored(Image.new("RGBA", (12, 8), (*COLORS[i], 255)))
        return {"image": file, "label": label, "text": f"number {i}"}

    class TinyThings(tfds.core.GeneratorBasedBuilder):
        """Four images."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            test = self._generate_examples(1, label=-1)
            return {"train": self._generate_examples(4), "test": test}

        def _generate_examples(self, count, label=None):
            for i in range(count):
                yield i, example(i, i % 2 if label is None else label)

    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    TinyThings(data_dir=folder, file_format="array_record").download_and_prepare()
    tfds.enable_progress_bar()
    changes = {"old": {"array_record": "tfrecord"}}
    changes["float"] = {"uint8": "float32", '"4"': '"1"'}  # of one channel
    for name, replaced in changes.items():
        other = folder / f"{name}_things" / "1.0.0"
        other.mkdir(parents=True)
        for file in (folder / "tiny_things" / "1.0.0").glob("*.json"):
            text = file.read_text().replace("tiny_things", f"{name}_things")
            for old, new in replaced.items():
                text = text.replace(old, new)
            (other / file.name).write_text(text)
    return folder


def dataset(folder, **fields):
    fields = {"tfds": "tiny_things:1.0.0", "tfds_data_dir": str(folder)} | fields
    return PairsSpec(size=8, field="config.safe", **fields)


def test_dataset_gives_images_with_their_texts_or_labels(prepared):
    data = load_pairs(dataset(prepared, caption_key="text"))
    assert data.images.shape == (4, 8, 8, 3)
    assert sorted(data.prompts) == [f"number {i}" for i in range(4)]
    assert data.concepts == data.prompts
    order = [int(prompt[-1]) for prompt in data.prompts]
    for image, i in zip(data.images, order, strict=True):
        assert (image == COLORS[i]).all()
    labeled = load_pairs(
        dataset(prepared, label_key="label", template="a photo of {a_concept}")
    )
    names = [("tiger cat", "owl")[i % 2] for i in order]
    articles = {"tiger cat": "a tiger cat", "owl": "an owl"}
    assert labeled.concepts == names
    assert labeled.prompts == [f"a photo of {articles[name]}" for name in names]
    prompted = load_pairs(dataset(prepared, prompt="p", tfds="tiny_things", limit=3))
    assert prompted.prompts == ["p"] * 3
    np.testing.assert_array_equal(prompted.images, data.images[:3])
    assert len(load_pairs(dataset(prepared, prompt="p", split="train[:50%]"))) == 2
    assert "tensorflow" not in sys.modules


def test_dataset_that_is_not_prepared_is_refused_with_the_command(
    prepared, monkeypatch, tmp_path
):
    command = r"run: python -c \"import tensorflow_datasets as tfds; tfds.data_source\("
    for name in ("tiny_things:2.0.0", "mnist", "no_such_things"):
        wanted = dataset(prepared, prompt="p", tfds=name)
        refused(wanted, rf"tfds={name} is not prepared; {command}'{name}', data_dir=")
    refused(
        dataset(prepared, prompt="p", tfds="old_things"),
        f"is prepared as tfrecord, must be as array_record; .*{command}'old_things'",
    )
    refused(dataset(prepared, prompt="p", tfds="a b"), "tfds=a b cannot be opened")


def test_dataset_with_a_missing_file_is_refused(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    (file,) = (tmp_path / "tiny_things").rglob("*train*")
    file.unlink()
    refused(dataset(tmp_path, prompt="p"), "train 0 cannot be read.*prepare it anew")


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(), "tfds needs one of caption_key, label_key, prompt, not none"),
        (dict(prompt="p", caption_key="text"), "not caption_key and prompt"),
        (dict(prompt="p", split="dev"), "split='dev' cannot be read: Unknown split"),
        (dict(prompt="p", split="train[:0]"), "split='train.:0.' cannot be read"),
        (dict(prompt="p", image_key="img"), "image_key='img' is no feature.*image"),
        (dict(prompt="p", image_key="label"), "image_key='label' is ClassLabel of"),
        (dict(prompt="p", tfds="float_things"), "image_key='image' is Image.*uint8"),
        (dict(caption_key="label"), "caption_key='label' is ClassLabel.*be a Text"),
        (
            dict(label_key="text", template="{concept}"),
            "label_key='text' is Text of .*, must be a ClassLabel",
        ),
        (dict(label_key="label"), "template=.* has a style, which labels do not have"),
        (dict(label_key="label", template="{thing}"), "template=.* may use only"),
        (
            dict(label_key="label", template="{concept}", split="test"),
            "label=-1 is no class",
        ),
    ],
)
def test_what_a_dataset_has_not_is_named(prepared, fields, message):
    refused(dataset(prepared, **fields), message)
