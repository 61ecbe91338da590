# SPDX-License-Identifier: Apache-2.0
"""Picture files from strangers: read as they are meant, or refused in one line."""

import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import zlib

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image

import gift_jax
from gift_jax.data.images import CROPS, SUFFIXES, read_image
from gift_jax.data.pairs import PairsSpec, load_pairs
from gift_jax.runtime.errors import UserError

ROOT = pathlib.Path(gift_jax.__file__).parents[1]
SIZE = 8
RED, BLUE, GREEN = (200, 0, 0), (0, 0, 200), (0, 200, 0)


def tries(count):
    """So many examples, the same in every run, none of which may take long."""
    return hypothesis.settings(
        max_examples=count, derandomize=True, database=None, deadline=5000
    )


def encoded(image, kind, **how):
    file = io.BytesIO()
    image.save(file, format=kind, **how)
    return file.getvalue()


def read(data, **how):
    return read_image(io.BytesIO(data), SIZE, name="odd.png", **how)


def checked(data):
    """The picture, of the right form, or None if it is refused in one line."""
    try:
        image = read(data)
    except UserError as error:
        assert str(error).startswith("odd.png cannot be read as a picture (")
        assert str(error).isprintable() and len(str(error)) < 600
        return None
    assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
    return image


def make_files():
    """{name: file} of one noisy picture in every way that Pillow can write here."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    image = Image.fromarray(pixels)
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    turned = [image.rotate(180)]
    files = {
        "png": encoded(image, "PNG"),
        "interlaced": encoded(image, "PNG", interlace=1),
        "palette": encoded(image.quantize(16), "PNG", transparency=3),
        "deep": encoded(deep, "PNG"),
        "apng": encoded(image, "PNG", save_all=True, append_images=turned),
        "jpeg": encoded(image, "JPEG"),
        "progressive": encoded(image, "JPEG", progressive=True),
        "cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "gif": encoded(image, "GIF", save_all=True, append_images=turned),
        "bmp": encoded(image, "BMP"),
        "ppm": encoded(image, "PPM"),
        "tga": encoded(image, "TGA", compression="tga_rle"),
        "tiff": encoded(image, "TIFF"),
        "lzw": encoded(image, "TIFF", compression="tiff_lzw"),
    }
    for kind in ("WEBP", "AVIF", "JPEG2000"):
        if kind in Image.SAVE:
            files[kind.lower()] = encoded(image, kind)
    return files


Image.init()
FILES = make_files()
KINDS = st.sampled_from(sorted(FILES))


# --- damage ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(FILES))
def test_whole_files_are_read(kind):
    assert checked(FILES[kind]).std() > 5


@tries(250)
@given(KINDS, st.floats(0, 1, exclude_max=True))
def test_a_cut_file_is_refused_or_as_good_as_whole(kind, place):
    data = FILES[kind]
    image = checked(data[: int(place * len(data))])
    if image is not None:  # what was cut says nothing of the first frame
        np.testing.assert_array_equal(image, checked(data))


@tries(300)
@given(KINDS, st.data())
def test_changed_bytes_are_harmless(kind, data):
    file = bytearray(FILES[kind])
    end = data.draw(st.sampled_from([32, 256, len(file)]))  # headers, most of all
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, min(end, len(file)) - 1))
        file[at] = data.draw(st.integers(0, 255))
    checked(bytes(file))


@tries(150)
@given(KINDS, st.integers(0, 40), st.binary(max_size=300))
def test_noise_behind_a_header_is_harmless(kind, length, noise):
    checked(FILES[kind][:length] + noise)


@tries(50)
@given(st.binary(max_size=200))
def test_noise_is_no_picture(noise):
    assert checked(noise) is None or noise[:2] in (b"P1", b"P2", b"P3", b"BM")


# --- kinds of pixels ------------------------------------------------------------------


def over_white(grey, alpha):
    return grey * alpha / 255 + 255 - alpha


BYTE = st.integers(0, 255)
SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40)) | st.sampled_from(
    [(1, 1), (1, 300), (300, 1)]
)


@tries(60)
@given(SHAPES, st.sampled_from(["PNG", "TIFF", "WEBP"]), st.tuples(*[BYTE] * 4))
def test_alpha_is_over_white(shape, kind, colour):
    how = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    image = read(encoded(Image.new("RGBA", shape, colour), kind, **how))
    wanted = [over_white(c, colour[3]) for c in colour[:3]]
    assert np.abs(image.astype(int) - wanted).max() <= 1
    grey = read(encoded(Image.new("LA", shape, colour[2:]), "PNG"))
    assert np.abs(grey.astype(int) - wanted[2]).max() <= 1


@tries(40)
@given(st.lists(st.tuples(*[BYTE] * 4), min_size=2, max_size=9), st.data())
def test_palettes_are_over_white_where_transparent(palette, data):
    index = data.draw(st.integers(0, len(palette) - 1))
    image = Image.new("P", (5, 5), index)
    image.putpalette([c for *rgb, _ in palette for c in rgb])
    opaque = read(encoded(image, "PNG"))
    assert (opaque == palette[index][:3]).all()
    alphas = bytes(alpha for *_, alpha in palette)
    clear = read(encoded(image, "PNG", transparency=alphas))
    wanted = [over_white(c, palette[index][3]) for c in palette[index][:3]]
    assert np.abs(clear.astype(int) - wanted).max() <= 1


@tries(60)
@given(SHAPES, st.tuples(*[BYTE] * 4), st.integers(0, 65535))
def test_cmyk_deep_grey_and_bits_keep_their_colours(shape, cmyk, deep):
    image = read(encoded(Image.new("CMYK", shape, cmyk), "TIFF"))
    wanted = [(255 - ink) * (255 - cmyk[3]) / 255 for ink in cmyk[:3]]
    assert np.abs(image.astype(int) - wanted).max() <= 2
    grey = Image.fromarray(np.full(shape[::-1], deep, np.uint16))
    for kind in ("PNG", "TIFF", "PPM"):
        assert (read(encoded(grey, kind)) == round(deep / 257)).all(), kind
    bit = Image.new("1", shape, deep % 2)
    for kind in ("PNG", "TIFF", "BMP", "PPM"):
        assert (read(encoded(bit, kind)) == 255 * (deep % 2)).all(), kind


@tries(40)
@given(st.sampled_from([np.float32, np.int32]), st.integers(-(2**31), 2**31 - 1))
def test_pixels_without_a_range_are_refused(dtype, value):
    data = encoded(Image.fromarray(np.full((4, 4), value, dtype)), "TIFF")
    image = checked(data)
    if dtype == np.float32 or not 0 <= value < 65536:
        assert image is None
    else:
        assert (image == round(value / 257)).all()


@tries(40)
@given(
    st.integers(4, 20_000),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(CROPS),
)
def test_very_wide_pictures_are_cropped_to_their_middle(length, width, upright, crop):
    pixels = np.empty((width, length, 3), np.uint8)
    pixels[:] = RED
    first = (length - width) // 2
    pixels[:, max(0, first - 3) : first + width + 4] = BLUE
    image = Image.fromarray(pixels.swapaxes(0, 1) if upright else pixels)
    found = read(encoded(image, "PNG"), crop=crop, rng=np.random.default_rng(0))
    assert found.shape == (SIZE, SIZE, 3)
    assert (found[..., 1] == 0).all() and (found.max((0, 1)) > 0).any()
    if crop == "center":
        assert (found == BLUE).all()
    if crop == "none" and length > 400:
        assert (found[0, 0] == RED).all() and (found[-1, -1] == RED).all()


@pytest.mark.parametrize("size", [(150_000, 1), (1, 150_000)])
def test_a_side_longer_than_any_picture_has_is_refused(size):
    with pytest.raises(UserError, match="a side of 150000 pixels"):
        read(encoded(Image.new("1", size), "PNG"))


# --- frames and orientation -----------------------------------------------------------


@tries(40)
@given(
    st.lists(st.sampled_from([RED, BLUE, GREEN]), min_size=2, max_size=5, unique=True),
    st.sampled_from(["GIF", "PNG", "WEBP", "TIFF"]),
)
def test_the_first_frame_counts(colours, kind):
    frames = [Image.new("RGB", (9, 9), colour) for colour in colours]
    how = {"lossless": True} if kind == "WEBP" else {}
    file = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **how)
    with Image.open(io.BytesIO(file)) as image:
        assert image.n_frames == len(colours)
    assert (read(file) == colours[0]).all()


UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: np.rot90,
}


def with_orientation(pixels, number, kind, **how):
    exif = Image.Exif()
    exif[0x0112] = number
    return encoded(Image.fromarray(pixels), kind, exif=exif, **how)


@tries(60)
@given(
    st.sampled_from([*UPRIGHT, 0, 9, 65535]),
    st.sampled_from(["PNG", "WEBP", "TIFF", "deep"]),
    st.integers(0, 9),
)
def test_exif_turns_pictures_upright(number, kind, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    if kind == "deep":
        stored, kind = pixels[..., 0].astype(np.uint16) * 257, "PNG"
        pixels = np.repeat(pixels[..., :1], 3, axis=-1)
    else:
        stored = pixels
    how = {"lossless": True} if kind == "WEBP" else {}
    image = read(with_orientation(stored, number, kind, **how))
    wanted = UPRIGHT.get(number, UPRIGHT[1])(pixels)
    np.testing.assert_array_equal(image, wanted)


@pytest.mark.parametrize("number", UPRIGHT)
def test_exif_turns_photographs_before_they_are_cropped(number):
    upright = np.zeros((16, 48, 3), np.uint8)
    upright[:, 16:24] = 255  # the left half of the middle square
    back = {5: 5, 6: 8, 8: 6}.get(number, number)
    data = with_orientation(
        np.ascontiguousarray(UPRIGHT[back](upright)), number, "JPEG", quality=100
    )
    image = read(data)
    assert image[:, :3].min() > 200 and image[:, 5:].max() < 50


# --- what is no picture ---------------------------------------------------------------

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
OTHERS = {
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "json": b'{"error": "rate limited"}',
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "zip": b"PK\x05\x06" + bytes(18),
    "pdf": b"%PDF-1.4\n%%EOF",
    "pickle": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00N.",
    "eps": EPS,
    "psd": encoded(Image.new("RGB", (9, 9)), "PCX"),
    "ico": encoded(Image.new("RGB", (16, 16)), "ICO"),
    "empty": b"",
    "zeros": bytes(1000),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_called_png_are_refused(kind):
    assert checked(OTHERS[kind]) is None


@pytest.mark.skipif(os.name != "posix", reason="needs a shell script and a pipe")
def test_no_other_program_is_run_and_no_pipe_waited_for(tmp_path, monkeypatch):
    ghostscript, ran = tmp_path / "gs", tmp_path / "ran"
    ghostscript.write_text(f"#!/bin/sh\ntouch {ran}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(OSError), Image.open(io.BytesIO(EPS)) as image:
        image.load()
    assert ran.exists()  # what Pillow does by itself
    ran.unlink()
    assert checked(EPS) is None and not ran.exists()
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="pipe.png cannot be read .*no regular file"):
        read_image(pipe, SIZE)


# --- bombs ----------------------------------------------------------------------------


def png(width, height, data=b""):
    """A PNG whose header says what it likes."""

    def chunk(name, content):
        check = zlib.crc32(name + content)
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def patched(kind, at, form, *values):
    file = bytearray(FILES[kind])
    struct.pack_into(form, file, at, *values)
    return bytes(file)


BOMBS = {
    "png": png(60_000, 60_000),
    "largest png": png(2**31 - 1, 2**31 - 1),
    "long png": png(2**27, 1),
    "just small enough png": png(13_000, 13_000, bytes(1000)),
    "bmp": patched("bmp", 18, "<ii", 2**30, 2**30),
    "gif": patched("gif", 6, "<HH", 65535, 65535),
    "tga": patched("tga", 12, "<HH", 65535, 65535),
    "ppm": b"P6\n99999999 99999999\n255\n",
    "pbm": b"P1\n" + b"9" * 5000 + b" 1\n1",
}
MEASURE = """
import json, pathlib, re, sys, time
from gift_jax.data import images
from gift_jax.runtime.errors import UserError


def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024

for name in ("whole", *sys.argv[2:]):
    path, before, began = pathlib.Path(sys.argv[1], name), peak(), time.monotonic()
    try:
        said = str(images.read_image(path, 8).mean())
    except UserError as error:
        said = str(error)
    print(json.dumps([name, said, peak() - before, time.monotonic() - began]))
assert "jax" not in sys.modules
"""


def measured(folder, files):
    """{name: (what is said, MB more than before, seconds)}, in a process of its own."""
    for name, data in ({"whole": FILES["png"]} | files).items():
        (folder / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), *files],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: found for name, *found in rows}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_bombs_take_no_memory_and_large_pictures_three_times_their_own(tmp_path):
    side, width = 4000, 4
    large = png(side, side, (b"\0" + bytes([200, 0, 0, 255]) * side) * side)
    found = measured(tmp_path, BOMBS | {"large": large})
    for name in BOMBS:
        said, more, seconds = found[name]
        assert "cannot be read as a picture" in said and "\n" not in said, name
        assert more < 40 and seconds < 10, (name, more, seconds)
    said, more, _ = found["large"]
    own = side * side * width / 2**20
    assert abs(float(said) - 200 / 3) < 1
    assert own < more < 3.5 * own


# --- folders --------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), max_size=20)
NAME_SUFFIXES = st.sampled_from([".png", ".PNG", ".jpg", ".gif", ".txt", "", ".svg"])
CONTENTS = {"good": FILES["png"], "cut": FILES["jpeg"][:300], **OTHERS}


@tries(60)
@given(
    st.dictionaries(
        st.builds(str.__add__, NAMES, NAME_SUFFIXES).filter(lambda n: n.strip(".")),
        st.sampled_from(["good"] * 9 + sorted(CONTENTS)),
        min_size=1,
        max_size=6,
    )
)
def test_a_folder_is_its_good_pictures_or_names_a_bad_one(files):
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            pathlib.Path(folder, name).write_bytes(CONTENTS[content])
        there = sorted(pathlib.Path(folder, name) for name in files)
        read = [p for p in there if p.suffix.lower() in SUFFIXES]
        read = [p for p in read if not p.name.startswith(".")]
        bad = [p for p in read if files[p.name] != "good"]
        spec = PairsSpec(folder=folder, prompt="p", size=SIZE, field="config.safe")
        try:
            data = load_pairs(spec)
        except UserError as error:
            assert bad or not read
            assert str(error).isprintable()  # no line ends, no escape sequences
            assert folder in str(error)
            assert not bad or bad[0].suffix in str(error)
        else:
            assert read and not bad
            assert len(data) == len(read) and data.prompts == ["p"] * len(read)
            one = checked(CONTENTS["good"])
            assert all((image == one).all() for image in data.images)
