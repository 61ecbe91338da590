# SPDX-License-Identifier: Apache-2.0
"""Image files from strangers: read as they are meant, or refused in one line."""

import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from properties import outcome, tries

import gift_jax
from gift_jax.data.images import SUFFIXES, read_image
from gift_jax.data.pairs import PairsSpec, load_pairs

ROOT = pathlib.Path(gift_jax.__file__).parents[1]
SIZE = 8


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def read(data):
    """Returns uint8 "8 8 3", or None if the file is refused."""
    image, _ = outcome(lambda: read_image(io.BytesIO(data), SIZE, name="odd.png"))
    assert image is None or (image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8)
    return image


def make_files():
    """Returns {name: file} of one noisy image in every way that Pillow writes here."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    image = Image.fromarray(pixels)
    frames = dict(save_all=True, append_images=[image.rotate(180)])
    files = {
        "png": encoded(image, "PNG"),
        "interlaced": encoded(image, "PNG", interlace=1),
        "palette": encoded(image.quantize(16), "PNG", transparency=3),
        "deep": encoded(Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG"),
        "apng": encoded(image, "PNG", **frames),
        "jpeg": encoded(image, "JPEG", progressive=True),
        "cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "gif": encoded(image, "GIF", **frames),
        "tga": encoded(image, "TGA", compression="tga_rle"),
        "lzw": encoded(image, "TIFF", compression="tiff_lzw"),
    }
    kinds = {"BMP", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000"} & set(Image.SAVE)
    return files | {kind.lower(): encoded(image, kind) for kind in kinds}


Image.init()
FILES = make_files()
KINDS = st.sampled_from(sorted(FILES))


@tries(250)
@given(KINDS, st.floats(0, 1, exclude_max=True))
def test_a_cut_file_is_refused_or_as_good_as_whole(kind, place):
    data = FILES[kind]
    whole, cut = read(data), read(data[: int(place * len(data))])
    assert whole.std() > 5
    if cut is not None:  # what was cut says nothing of the first frame
        np.testing.assert_array_equal(cut, whole)


@tries(300)
@given(KINDS, st.data())
def test_changed_bytes_are_harmless(kind, data):
    file = bytearray(FILES[kind])
    end = data.draw(st.sampled_from([32, 256, len(file)]))  # headers, most of all
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, min(end, len(file)) - 1))
        file[at] = data.draw(st.integers(0, 255))
    read(bytes(file))


@tries(150)
@given(KINDS, st.integers(0, 40), st.binary(max_size=300))
def test_noise_behind_a_header_is_harmless(kind, length, noise):
    read(FILES[kind][:length] + noise)


BYTE = st.integers(0, 255)


@tries(60)
@given(st.tuples(*[st.integers(1, 300)] * 2), st.tuples(*[BYTE] * 4))
def test_any_kind_of_pixel_keeps_its_color(shape, color):
    *rgb, alpha = color
    over_white = [c * alpha / 255 + 255 - alpha for c in rgb]
    image = read(encoded(Image.new("RGBA", shape, color), "PNG")).astype(int)
    assert np.abs(image - over_white).max() <= 1
    palette = Image.new("P", shape, 0)
    palette.putpalette(rgb)
    image = read(encoded(palette, "PNG", transparency=bytes([alpha]))).astype(int)
    assert np.abs(image - over_white).max() <= 1
    ink = [(255 - c) * (255 - alpha) / 255 for c in rgb]
    image = read(encoded(Image.new("CMYK", shape, color), "TIFF")).astype(int)
    assert np.abs(image - ink).max() <= 2
    deep = Image.fromarray(np.full(shape, 257 * alpha, np.uint16))
    assert (read(encoded(deep, "PNG")) == alpha).all()
    assert (
        read(encoded(Image.fromarray(np.full(shape, 0.5, np.float32)), "TIFF")) is None
    )


@tries(40)
@given(st.sampled_from(range(10)), st.sampled_from(["PNG", "WEBP", "TIFF"]))
def test_exif_turns_images_upright(number, kind):
    pixels = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = number
    options = {"lossless": True} if kind == "WEBP" else {}
    image = read(encoded(Image.fromarray(pixels), kind, exif=exif, **options))
    flips = {2: np.fliplr, 3: lambda a: a[::-1, ::-1], 4: np.flipud, 8: np.rot90}
    flips |= {5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, -1)}
    flips |= {7: lambda a: np.rot90(a.swapaxes(0, 1), 2)}
    np.testing.assert_array_equal(image, flips.get(number, lambda a: a)(pixels))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
OTHERS = {
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "zip": b"PK\x05\x06" + bytes(18),
    "pickle": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00N.",
    "eps": EPS,
    "ico": encoded(Image.new("RGB", (16, 16)), "ICO"),
    "zeros": bytes(1000),
    "long": encoded(Image.new("1", (150_000, 1)), "PNG"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_refused(kind):
    assert read(OTHERS[kind]) is None


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
    assert read(EPS) is None and not ran.exists()
    os.mkfifo(tmp_path / "pipe.png")
    assert outcome(lambda: read_image(tmp_path / "pipe.png", SIZE))[1]


def png(width, height, data=b""):
    """Returns a PNG whose header says what it likes."""

    def chunk(name, content):
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

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
    "just small enough png": png(13_000, 13_000, bytes(1000)),
    "bmp": patched("bmp", 18, "<ii", 2**30, 2**30),
    "gif": patched("gif", 6, "<HH", 65535, 65535),
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

for name in sys.argv[2:]:
    path, before, start = pathlib.Path(sys.argv[1], name), peak(), time.monotonic()
    try:
        result = images.read_image(path, 8).mean()
    except UserError as error:
        result = None
    print(json.dumps([name, result, peak() - before, time.monotonic() - start]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_bombs_take_no_memory_and_large_images_three_times_their_own(tmp_path):
    side = 4000
    large = png(side, side, (b"\0" + bytes([200, 0, 0, 255]) * side) * side)
    files = {"whole": FILES["png"]} | BOMBS | {"large": large}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", MEASURE, str(tmp_path), *files]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=env, capture_output=True, timeout=120, check=True)
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    results = {name: numbers for name, *numbers in rows}
    for name in BOMBS:
        mean, megabytes, seconds = results[name]
        assert mean is None and megabytes < 40 and seconds < 10, (name, results[name])
    mean, megabytes, _ = results["large"]
    assert abs(mean - 200 / 3) < 1
    assert 1 < megabytes / (side * side * 4 / 2**20) < 3.5


NAMES = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), max_size=20)
ENDINGS = st.sampled_from([".png", ".PNG", ".jpg", ".gif", ".txt", "", ".svg"])
CONTENTS = {"good": FILES["png"], "cut": FILES["jpeg"][:300], **OTHERS}


@tries(60)
@given(
    st.dictionaries(
        st.builds(str.__add__, NAMES, ENDINGS).filter(lambda name: name.strip(".")),
        st.sampled_from(["good"] * 9 + sorted(CONTENTS)),
        min_size=1,
        max_size=6,
    )
)
def test_a_folder_is_its_good_images_or_names_a_bad_one(files):
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            pathlib.Path(folder, name).write_bytes(CONTENTS[content])
        paths = [p for p in pathlib.Path(folder).iterdir() if p.name[0] != "."]
        images = [p.name for p in paths if p.suffix.lower() in SUFFIXES]
        spec = PairsSpec(folder=folder, prompt="p", size=SIZE, field="config.safe")
        data, message = outcome(lambda: load_pairs(spec))
        if all(files[name] == "good" for name in images) and images:
            assert len(data) == len(images)
            assert (data.images == read(FILES["png"])).all()
        else:
            assert folder in message
