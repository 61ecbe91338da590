# SPDX-License-Identifier: Apache-2.0
"""Metadata files from strangers: read as they say, or refused in one line.

Whatever they name, nothing outside the folder is opened.
"""

import json
import os
import pathlib
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from properties import audited, outcome, tries

from gift_jax.data.pairs import PairsSpec, load_pairs
from gift_jax.data.sources import folder, layout

INSIDE = ("a.png", "b.png", "sub/c.png", "a b,ü.png", "-.png")


@pytest.fixture(scope="module")
def root():
    """A folder `data` of images, with links out of it, and a secret beside it."""
    with tempfile.TemporaryDirectory() as top:
        root = pathlib.Path(os.path.realpath(top), "data")
        secret = root.parent / "secret.png"
        for path in (*(root / name for name in INSIDE), secret):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(path)
        (root.parent / "metadata.csv").write_text("file_name,text\na.png,outside\n")
        links = {"out.png": secret, "up": root.parent, "in.png": "a.png"}
        links |= {"loop.png": "pool.png", "pool.png": "loop.png", "gone.png": "x.png"}
        for name, target in links.items():
            (root / name).symlink_to(target)
        yield root


def listed(root, name, content, **fields):
    """Returns (paths, captions) of a metadata file, or None if it is refused."""
    spec = PairsSpec(folder=str(root), size=4, **fields)
    (root / name).write_bytes(content)
    try:
        (result, message), opened, _ = audited(
            lambda: outcome(lambda: folder.list_images(spec))
        )
    finally:
        (root / name).unlink()
    assert all(pathlib.Path(path).is_relative_to(root) for path in opened)
    if result is None:
        assert name in message
        return None
    paths, captions = result
    real = [pathlib.Path(os.path.realpath(path)) for path in paths]
    assert len(captions) == len(set(real)) == len(paths) > 0
    assert all(path.is_file() and path.is_relative_to(root) for path in real)
    texts = [text for several in captions for text in several]
    assert all(captions) and all(text.strip() and text.encode() for text in texts)
    return paths, captions


def as_jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
PARTS = st.sampled_from(
    ["..", ".", "", "a.png", "sub", "up", "out.png", "secret.png", "data", "in.png"]
    + ["loop.png", "gone.png", "\\", "C:", "~", "\0", "\n", "\u202e", "x" * 300]
)
PATHS = st.lists(PARTS, min_size=1, max_size=6).map("/".join)
PATHS |= st.sampled_from(["/etc/hosts", "file:///etc/hosts", "x/" * 3000, "a.png/"])


@tries(80)
@given(st.lists(st.sampled_from(INSIDE), min_size=1, unique=True), st.data())
def test_what_is_written_is_read(root, names, data):
    captions = [data.draw(TEXT.filter(str.strip)) for _ in names]
    rows = zip(names, captions, strict=True)
    content = as_jsonl(*({"file_name": n, "more": 1, "text": t} for n, t in rows))
    expected = [root / name for name in names], [(text,) for text in captions]
    assert listed(root, "metadata.jsonl", content) == expected
    assert listed(root, "metadata.jsonl", b"\xef\xbb\xbf" + content) == expected


@tries(250)
@given(PATHS | TEXT, st.booleans())
def test_no_name_leads_out_of_the_folder(root, name, absolute):
    name = f"{root.parent}/{name}" if absolute else name
    listed(root, "metadata.jsonl", as_jsonl({"file_name": name, "text": "x"}))


def test_links_out_of_the_folder_are_refused(root):
    assert (root / "out.png").is_file() and (root / "up/secret.png").is_file()
    for name in ("out.png", "up/secret.png", "up/data/../secret.png", "../secret.png"):
        assert not listed(root, "metadata.csv", f"file_name,text\n{name},x".encode())
    spec = PairsSpec(folder=str(root), prompt="p", size=4)
    (_, message), opened, _ = audited(lambda: outcome(lambda: load_pairs(spec)))
    assert message and str(root.parent / "secret.png") not in opened
    for name in layout.METADATA:
        (root / name).symlink_to("../metadata.csv")
        (_, message), opened, _ = audited(lambda: outcome(lambda: folder.check(spec)))
        (root / name).unlink()
        assert message and not any(path.endswith("metadata.csv") for path in opened)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v) | st.dictionaries(TEXT, v), max_leaves=8
)
KEYS = st.sampled_from(["file_name", "text", "TEXT", ""]) | TEXT
CELLS = st.sampled_from(["file_name", "text", *INSIDE]) | TEXT


@tries(200)
@given(st.lists(st.dictionaries(KEYS, VALUES | st.sampled_from(INSIDE)), max_size=4))
def test_any_json_is_listed_or_refused(root, rows):
    listed(root, "metadata.jsonl", as_jsonl(*rows))


@tries(200)
@given(st.lists(st.lists(CELLS, max_size=4), max_size=5), st.sampled_from("\n\r"))
def test_any_table_is_listed_or_refused(root, rows, end):
    listed(root, "metadata.csv", end.join(",".join(row) for row in rows).encode())


@tries(150)
@given(st.sampled_from(layout.METADATA), st.binary(max_size=60), st.booleans())
def test_any_bytes_are_listed_or_refused(root, name, noise, partial):
    head = {
        "csv": b"file_name,text\na.png,",
        "jsonl": b'{"file_name": "a.png", "text": ',
    }
    listed(root, name, head[name.partition(".")[2]] * partial + noise)


ROW = b'{"file_name": "a.png", "text": '


@pytest.mark.parametrize(
    "name, content",
    [
        ("metadata.csv", b""),
        ("metadata.csv", b"file_name,text,text\na.png,x,y\n"),
        ("metadata.csv", b"file_name,text\na.png,x\nin.png,x\n"),  # one pair twice
        ("metadata.csv", b",".join(b"c%d" % i for i in range(9999)) + b"\n1\n"),
        ("metadata.csv", b"file_name,text\na.png," + b"x" * 10**6),
        ("metadata.jsonl", ROW + b"1e999}"),
        ("metadata.jsonl", ROW + b'"\\ud83d"}'),  # half a surrogate pair
        ("metadata.jsonl", ROW + b'"x", "text": "y"}'),
        ("metadata.jsonl", ROW + b"9" * 5000 + b"}"),
        ("metadata.jsonl", ROW + b"[" * 100_000),
        ("metadata.jsonl", as_jsonl({"x" * 5_000_000: 1})),
        ("metadata.jsonl", as_jsonl({f"c{i}": i for i in range(200_000)})),
    ],
)
def test_a_flaw_is_refused(root, name, content):
    assert listed(root, name, content) is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_metadata_that_is_not_a_file_is_not_waited_for(tmp_path, make):
    make(tmp_path / "metadata.csv")
    spec = PairsSpec(folder=str(tmp_path), prompt="p")
    assert outcome(lambda: folder.list_images(spec))[1]


@tries(40)
@given(PATHS | TEXT)
def test_a_missing_folder_is_named(name):
    spec = PairsSpec(folder=f"nowhere/{name}", prompt="p", field="config.safe")
    _, message = outcome(lambda: folder.list_images(spec))
    assert message.startswith("config.safe.folder=nowhere/")
