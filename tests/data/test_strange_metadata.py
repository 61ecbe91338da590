# SPDX-License-Identifier: Apache-2.0
"""Metadata files from strangers: read as they say, or refused by file and line.

Whatever they name, nothing outside the folder is opened.
"""

import csv
import io
import json
import os
import pathlib
import re
import sys
import tempfile

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gift_jax.data.pairs import PairsSpec, load_pairs
from gift_jax.data.sources import folder
from gift_jax.runtime.errors import UserError

HERE = ("a.png", "b.png", "sub/c.png", "a b,ü.png", "-.png")


def tries(count):
    """So many examples, the same in every run, none of which may take long."""
    return hypothesis.settings(
        max_examples=count, derandomize=True, database=None, deadline=5000
    )


class Opened:
    """The files that this process opens while it is asked to look."""

    def __init__(self):
        self.paths, self.looking = set(), False
        sys.addaudithook(self._hear)

    def _hear(self, event, args):
        if event == "open" and self.looking and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(args[0]))
            if not path.endswith((".py", ".pyc")):  # Python's own, at first use
                self.paths.add(path)

    def during(self, call):
        """Returns (what a call returns or the message it is refused with, paths)."""
        self.paths, self.looking = set(), True
        try:
            return call(), self.paths
        except UserError as error:
            return str(error), self.paths
        finally:
            self.looking = False


OPENED = Opened()


@pytest.fixture(scope="module")
def place():
    """A folder `data` of pictures, and beside it what is none of its business."""
    with tempfile.TemporaryDirectory() as top:
        root = pathlib.Path(os.path.realpath(top), "data")
        secret = root.parent / "secret.png"
        for path in (*(root / name for name in HERE), secret):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(path)
        (root / "notes.txt").write_text("no picture")
        (root.parent / "metadata.csv").write_text("file_name,text\na.png,outside\n")
        (root / "out.png").symlink_to(secret)
        (root / "up").symlink_to(root.parent)
        (root / "in.png").symlink_to("a.png")
        (root / "loop.png").symlink_to("pool.png")
        (root / "pool.png").symlink_to("loop.png")
        (root / "gone.png").symlink_to("nowhere.png")
        yield root


def listing(root, name, content, **fields):
    """(paths, prompts), or the one line that a metadata file is refused with.

    Asserts what holds in any case.
    """
    fields = {"size": 4, "field": "config.safe"} | fields
    spec = PairsSpec(folder=str(root), **fields)
    (root / name).write_bytes(content)
    try:
        found, opened = OPENED.during(lambda: folder.listing(spec))
    finally:
        (root / name).unlink()
    assert all(pathlib.Path(path).is_relative_to(root) for path in opened)
    assert str(root / name) in opened
    if isinstance(found, str):
        assert found.startswith(f"config.safe.folder: {root / name}")
        assert found.isprintable() and len(found) < 1000
        return found
    paths, prompts = found
    assert len(paths) == len(prompts) == len({os.path.realpath(p) for p in paths}) > 0
    for path, prompt in zip(paths, prompts, strict=True):
        assert os.path.isfile(path)
        assert pathlib.Path(os.path.realpath(path)).is_relative_to(root)
        assert prompt.strip() and prompt.encode()
    return found


def written(form, rows):
    """The rows, dicts, as a metadata file of that form."""
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(columns)
    writer.writerows([row.get(name, "") for name in columns] for row in rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


FORMS = st.sampled_from(["csv", "jsonl"])
TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
CAPTIONS = TEXT.filter(str.strip)


# --- what is right --------------------------------------------------------------------


@tries(80)
@given(
    FORMS,
    st.lists(st.sampled_from(HERE), min_size=1, unique=True),
    st.data(),
    st.booleans(),
)
def test_what_is_written_is_read(place, form, names, data, bom):
    captions = [data.draw(CAPTIONS) for _ in names]
    both = zip(names, captions, strict=True)
    rows = [{"file_name": name, "more": "x", "text": text} for name, text in both]
    content = (b"\xef\xbb\xbf" if bom else b"") + written(form, rows)
    paths, prompts = listing(place, f"metadata.{form}", content)
    assert paths == [place / name for name in names]
    assert prompts == captions
    paths, prompts = listing(place, f"metadata.{form}", content, limit=1, prompt="p")
    assert paths == [place / names[0]] and prompts == ["p"]


# --- paths ----------------------------------------------------------------------------

PARTS = st.sampled_from(
    ["..", ".", "", "a.png", "sub", "c.png", "up", "out.png", "secret.png", "data"]
    + ["in.png", "loop.png", "gone.png", "notes.txt", "\\", "..\\", "C:", "~", "%2e%2e"]
    + ["\0", "\n", "\u202e", "\u2024\u2024", "\uff0e\uff0e", "\udcff", "x" * 300]
)
PATHS = st.lists(PARTS, min_size=1, max_size=6).map("/".join)
ODD_PATHS = st.sampled_from(
    ["../secret.png", "sub/../../secret.png", "up/secret.png", "out.png", "/etc/hosts"]
    + [
        "..\\secret.png",
        "up/data/a.png",
        "x/" * 3000,
        "x" * 100_000,
        "a.png/",
        "//a",
        "sub/../a.png",
    ]
    + ["./a.png", "sub//c.png", "file:///etc/hosts", "https://a.b/c.png", "a.png\0"]
)


@tries(250)
@given(FORMS, PATHS | ODD_PATHS | TEXT, st.booleans())
def test_no_name_leads_out_of_the_folder(place, form, name, absolute):
    if absolute:
        name = f"{place.parent}/{name}"
    rows = [{"file_name": name, "text": "x"}]
    found = listing(place, f"metadata.{form}", written(form, rows))
    if isinstance(found, str):
        wanted = "must stay inside|is no file in|is empty|must be text|UTF-8|malformed"
        assert re.search(wanted, found)
    else:
        assert not absolute and ".." not in name.split("/")
        assert found[0] == [place / name]


def test_the_traps_are_set_and_each_is_refused(place):
    assert (place / "out.png").is_file() and (place / "up/secret.png").is_file()
    for name in ("out.png", "up/secret.png", "up/data/../secret.png", "../secret.png"):
        rows = [{"file_name": name, "text": "x"}]
        for form in ("csv", "jsonl"):
            found = listing(place, f"metadata.{form}", written(form, rows))
            assert f"file_name='{name}' must stay inside {place}" in found
    assert listing(place, "metadata.csv", b"file_name,text\nin.png,x\n")[1] == ["x"]


@pytest.mark.parametrize("name", folder.METADATA)
def test_a_metadata_file_may_not_be_a_link_out(place, name):
    spec = PairsSpec(folder=str(place), field="config.safe")
    (place / name).symlink_to("../metadata.csv")
    try:
        found, opened = OPENED.during(lambda: folder.listing(spec))
    finally:
        (place / name).unlink()
    assert "\n" not in found and f"{name} is a link out of the folder" in found
    assert not any(path.endswith("metadata.csv") for path in opened)


def test_a_folder_without_metadata_does_not_follow_links_out(place):
    spec = PairsSpec(folder=str(place), prompt="p", size=4, field="config.safe")
    found, opened = OPENED.during(lambda: load_pairs(spec))
    assert "\n" not in found and "out.png is a link out of the folder" in found
    assert str(place.parent / "secret.png") not in opened


def test_a_folder_may_itself_be_a_link(place):
    link = place.parent / "link"
    link.symlink_to(place)
    (place / "metadata.csv").write_text("file_name,text\nin.png,x\n")
    spec = PairsSpec(folder=str(link), size=4, field="config.safe")
    try:
        data, opened = OPENED.during(lambda: load_pairs(spec))
    finally:
        (place / "metadata.csv").unlink()
        link.unlink()
    assert len(data) == 1 and str(place / "a.png") in opened


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_metadata_that_is_no_file_is_not_waited_for(tmp_path, make):
    make(tmp_path / "metadata.csv")
    with pytest.raises(UserError, match="metadata.csv must be a file; remove it"):
        folder.listing(PairsSpec(folder=str(tmp_path), prompt="p"))


@tries(40)
@given(PATHS | ODD_PATHS | TEXT)
def test_a_folder_that_is_none_is_named(name):
    spec = PairsSpec(folder=f"nowhere/{name}", prompt="p", field="config.safe")
    with pytest.raises(UserError) as caught:
        folder.listing(spec)
    assert str(caught.value).startswith("config.safe.folder=nowhere/")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


# --- contents -------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = st.sampled_from(["file_name", "text", "TEXT", "filename", ""]) | TEXT


@tries(200)
@given(st.lists(st.dictionaries(KEYS, VALUES | st.sampled_from(HERE)), max_size=4))
def test_any_json_is_listed_or_refused(place, rows):
    found = listing(place, "metadata.jsonl", written("jsonl", rows))
    if not isinstance(found, str):
        assert [place / row["file_name"] for row in rows] == found[0]
        assert [row["text"] for row in rows] == found[1]


@tries(200)
@given(
    st.lists(
        st.lists(st.sampled_from(["file_name", "text", *HERE]) | TEXT, max_size=4),
        max_size=5,
    ),
    st.sampled_from(["\n", "\r\n", "\r", "\n\n"]),
)
def test_any_table_is_listed_or_refused(place, rows, end):
    content = end.join(",".join(row) for row in rows).encode()
    found = listing(place, "metadata.csv", content)
    if not isinstance(found, str):
        assert rows and "file_name" in content.decode() and "text" in content.decode()


@tries(150)
@given(
    st.sampled_from(folder.METADATA),
    st.binary(max_size=60),
    st.sampled_from(
        [b"", b"file_name,text\na.png,", b'{"file_name": "a.png", "text": ']
    ),
)
def test_any_bytes_are_listed_or_refused(place, name, noise, before):
    found = listing(place, name, before + noise)
    if not isinstance(found, str):
        assert before and (before + noise).decode("utf-8-sig")


DEEP = '{"file_name": ' + "[" * 100_000


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metadata.csv", b"", "lists no pictures"),
        ("metadata.jsonl", b"", "lists no pictures"),
        ("metadata.jsonl", b"\n \n", "lists no pictures"),
        ("metadata.csv", b"\n", "lists no pictures"),
        ("metadata.csv", b"\xff\xfef\0i\0", "cannot be read as UTF-8 text"),
        ("metadata.csv", b"file_name,text\na.png,\xff\n", "cannot be read as UTF-8"),
        ("metadata.csv", b"text\nx\n", "line 2: no column 'file_name' among 'text'"),
        ("metadata.csv", b"file_name,text,text\na.png,x,y\n", "'text' appears twice"),
        (
            "metadata.csv",
            b"file_name,file_name\na.png,x\n",
            "'file_name' appears twice",
        ),
        (
            "metadata.csv",
            b",".join(b"c%d" % i for i in range(9999)) + b"\n1\n",
            r" \.\.\.;",
        ),
        ("metadata.csv", b"file_name,text\na.png," + b"x" * 10**6, "malformed CSV"),
        ("metadata.csv", b"file_name,text\na.png,x\nin.png,y\n", "is on line 2 too"),
        ("metadata.csv", b"file_name,text\ngone.png,x\n", "'gone.png' is no file in"),
        ("metadata.csv", b"file_name,text\nloop.png,x\n", "'loop.png' is no file in"),
        (
            "metadata.jsonl",
            b'{"file_name": "a.png", "text": 1e999}',
            "text=inf must be",
        ),
        ("metadata.jsonl", b'{"text": "x", "text": "y"}', "'text' appears twice"),
        ("metadata.jsonl", b'{"a": {"b": 1, "b": 2}}', "'b' appears twice"),
        (
            "metadata.jsonl",
            b'{"file_name": "a.png", "text": "\\ud83d"}',
            "must be text",
        ),
        ("metadata.jsonl", b'{"file_name": ' + b"9" * 5000 + b"}", "malformed JSON"),
        ("metadata.jsonl", DEEP.encode(), "malformed JSON"),
        ("metadata.jsonl", b'"a.png"', "must be a JSON object"),
    ],
)
def test_what_is_wrong_is_said(place, name, content, message):
    found = listing(place, name, content)
    assert isinstance(found, str) and re.search(message, found)


@tries(40)
@given(st.integers(1, 1200), st.sampled_from(["file_name", "text"]))
def test_nesting_of_any_depth_is_refused(place, depth, column):
    value = "[" * depth + "]" * depth
    row = f'{{"{column}": {value}, "file_name_": 1}}'
    if column == "text":
        row = f'{{"file_name": "a.png", "text": {value}}}'
    found = listing(place, "metadata.jsonl", row.encode())
    assert "must be text" in found or "malformed JSON" in found


def test_huge_lines_are_read_and_said_in_short(place):
    text = "x" * 5_000_000
    rows = [{"file_name": "a.png", "text": text}]
    content = written("jsonl", rows)
    assert listing(place, "metadata.jsonl", content)[1] == [text]
    found = listing(place, "metadata.jsonl", written("jsonl", [{text: "x"}]))
    assert "no column 'file_name' among 'xxx" in found
    found = listing(place, "metadata.jsonl", written("jsonl", [{"file_name": text}]))
    assert "... (5000000 characters) is no file in" in found
    many = {f"c{i}": i for i in range(200_000)}
    found = listing(place, "metadata.jsonl", written("jsonl", [many]))
    assert "no column 'file_name' among 'c0', 'c1'" in found
