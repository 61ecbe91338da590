# SPDX-License-Identifier: Apache-2.0
"""Weight files from strangers: read exactly or refused in a line, never unpickled."""

import functools
import json
import math
import os
import pathlib
import pickle
import struct
import sys
import tempfile
import zipfile

import hypothesis
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from gift_jax.models import safetensors_io
from gift_jax.models.sd import stable_diffusion
from gift_jax.runtime.errors import UserError

BYTES = {
    name: np.dtype(kind).itemsize for name, kind in safetensors_io.ALL_DTYPES.items()
}


def tries(count):
    """So many examples, the same in every run, none of which may take long."""
    return hypothesis.settings(
        max_examples=count, derandomize=True, database=None, deadline=5000
    )


@pytest.fixture(scope="module")
def path():
    """Where a file is written over and over."""
    with tempfile.TemporaryDirectory() as folder:
        yield pathlib.Path(folder, "odd.safetensors")


def file_of(header, data=b""):
    """A file of a header, as it is or as JSON, and of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def looked_at(path, content):
    """{name: array}, or None if the file is refused in one line.

    Asserts what holds of whatever is accepted: every byte of the file belongs to one
    tensor or to the header, and arrays are as the header says.
    """
    path.write_bytes(content)
    try:
        entries = safetensors_io.read_header(path)
        metadata = safetensors_io.read_metadata(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ")
        assert str(error).isprintable() and len(str(error)) < 1500
        return None
    assert all(type(v) is str for pair in metadata.items() for v in pair)
    start = 8 + int.from_bytes(content[:8], "little")
    spans = sorted((entry.begin, entry.end) for entry in entries.values())
    ends = [start, *(end for _, end in spans)]
    assert [begin for begin, _ in spans] + [len(content)] == ends
    arrays = {}
    for name, entry in entries.items():
        array = safetensors_io.read_tensor(name, entry, only_floats=False)
        assert array.shape == entry.shape and array.nbytes == entry.end - entry.begin
        assert array.dtype == safetensors_io.ALL_DTYPES[entry.dtype]
        assert array.tobytes() == content[entry.begin : entry.end]
        arrays[name] = array
    return arrays


# --- round trip -----------------------------------------------------------------------

NAMES = st.text(max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
TABLES = st.dictionaries(
    NAMES,
    st.tuples(st.sampled_from(sorted(BYTES)), SHAPES, st.integers(0, 255)),
    max_size=5,
)
TEXTS = st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3)


def array_of(dtype, shape, byte):
    raw = np.full(math.prod(shape) * BYTES[dtype], byte, np.uint8)
    if dtype == "BOOL":
        raw &= 1
    return raw.view(safetensors_io.ALL_DTYPES[dtype]).reshape(shape)


@tries(150)
@given(TABLES, st.none() | TEXTS)
def test_what_is_written_is_read(path, table, metadata):
    wanted = {name: array_of(*how) for name, how in table.items()}
    safetensors_io.write_file(
        path,
        {
            name: (dtype, shape, functools.partial(wanted.__getitem__, name))
            for name, (dtype, shape, _) in table.items()
        },
        metadata,
    )
    content = path.read_bytes()
    found = looked_at(path, content)
    assert list(found) == list(wanted)
    for name, array in found.items():
        assert array.shape == wanted[name].shape and array.dtype == wanted[name].dtype
        assert array.tobytes() == wanted[name].tobytes()
    assert safetensors_io.read_metadata(path) == (metadata or {})
    assert (8 + int.from_bytes(content[:8], "little")) % 8 == 0


@tries(100)
@given(TABLES)
def test_only_three_dtypes_are_read_as_weights(path, table):
    for name, how in table.items():
        array = array_of(*how)
        safetensors_io.write_file(path, {name: (*how[:2], lambda array=array: array)})
        (entry,) = safetensors_io.read_header(path).values()
        if how[0] in ("F32", "F16", "BF16"):
            assert safetensors_io.read_tensor(name, entry).shape == how[1]
        else:
            with pytest.raises(
                UserError, match="has dtype .*; must be one of F32, F16"
            ):
                safetensors_io.read_tensor(name, entry)


# --- damage ---------------------------------------------------------------------------

GOOD = safetensors.numpy.save(
    {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.asarray(2.5, np.float16),
        "ids": np.arange(4)[None],
        "empty": np.zeros((0, 3), np.float32),
    },
    {"format": "pt"},
)
LENGTH = int.from_bytes(GOOD[:8], "little")


@tries(150)
@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=20))
def test_a_file_cut_or_longer_is_refused(path, size, more):
    assert len(looked_at(path, GOOD)) == 4
    assert looked_at(path, GOOD[:size]) is None
    assert looked_at(path, GOOD + more) is None


@tries(300)
@given(st.lists(st.tuples(st.integers(0, LENGTH + 7), st.integers(0, 255)), max_size=4))
def test_changed_bytes_are_read_as_the_library_reads_them(path, changes):
    content = bytearray(GOOD)
    for at, byte in changes:
        content[at] = byte
    found = looked_at(path, bytes(content))
    if found is not None:
        theirs = safetensors.deserialize(bytes(content))
        assert {name: (a["dtype"], tuple(a["shape"])) for name, a in theirs} == {
            name: (entry.dtype, entry.shape)
            for name, entry in safetensors_io.read_header(path).items()
        }


@tries(100)
@given(st.binary(max_size=80), st.integers(0, 2**64 - 1), st.booleans())
def test_noise_and_huge_header_lengths_are_refused(path, noise, length, small):
    length = length % 100 if small else length
    content = struct.pack("<Q", length) + noise
    found = looked_at(path, content)
    assert found is None or json.loads(noise[:length]) is not None


# --- headers --------------------------------------------------------------------------

COUNTS = st.sampled_from(
    [0, 1, 2, 3, 4, 8, -1, -4, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 10**40]
)
ODD = st.sampled_from(
    [None, True, False, 0.0, 1.5, float("nan"), float("inf"), "4", "", [], {}, [[1]]]
)
SIDES = st.lists(COUNTS | ODD, max_size=4) | st.just([1] * 65) | st.just([2**62] * 64)
SHAPE = SIDES | ODD | st.just([0] + [2**62] * 3) | st.just({"1": 1})
OFFSETS = st.lists(COUNTS | ODD, max_size=3) | st.tuples(COUNTS, COUNTS) | ODD
KINDS = st.sampled_from([*sorted(BYTES), "F31", "f32", "F32\n", "", "x" * 5000]) | ODD
INFO = (
    st.fixed_dictionaries({"dtype": KINDS, "shape": SHAPE, "data_offsets": OFFSETS})
    | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), ODD)
    | ODD
)
HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "", "x\ny\x1b[31m", "\udcff", "n" * 5000]),
    INFO,
    max_size=3,
)


@tries(400)
@given(HEADERS, st.integers(0, 64), st.none() | ODD | st.dictionaries(NAMES, ODD))
def test_any_header_is_read_or_refused(path, header, size, metadata):
    if metadata is not None:
        header = header | {"__metadata__": metadata}
    found = looked_at(path, file_of(header, bytes(size)))
    if found:
        assert sum(array.nbytes for array in found.values()) == size


def of(dtype="F32", shape=(2,), offsets=(0, 8), **others):
    return {
        "dtype": dtype,
        "shape": list(shape),
        "data_offsets": list(offsets),
    } | others


FLAWS = {
    "overlapping": {"a": of(), "b": of(offsets=(4, 12))},
    "twice the same bytes": {"a": of(), "b": of()},
    "a gap": {"a": of(), "b": of(offsets=(12, 20))},
    "late": {"a": of(offsets=(8, 16))},
    "negative": {"a": of(offsets=(-8, 0))},
    "backwards": {"a": of(offsets=(8, 0))},
    "beyond the end": {"a": of(shape=(2**40,), offsets=(0, 2**42))},
    "a product that overflows to 2": {"a": of(shape=(2**63 + 1, 2))},
    "a product of 2 to the 64": {"a": of(shape=(2**32, 2**32), offsets=(0, 0))},
    "many sides": {"a": of(shape=(1,) * 65 + (2,))},
    "millions of sides": {"a": of(shape=(2**62,) * 300_000)},
    "nothing of a huge shape": {
        "a": of(shape=(0, 2**62, 2**62), offsets=(0, 0)),
        "b": of(),
    },
    "a shape of text": {"a": of(dtype="F64") | {"shape": ""}},
    "a shape of names": {"a": of(dtype="F64") | {"shape": {}}},
    "negative sides": {"a": of(shape=(-1, -2))},
    "sides of truth": {"a": of(shape=(True, 2))},
    "offsets of truth": {"a": of(offsets=(False, 8))},
    "fractions": {"a": of(offsets=(0.0, 8.0))},
    "a gap before a name of two lines": {"a": of(), "b\nc": of(offsets=(12, 20))},
    "two lines beyond the end": {"b\nc": of(shape=(4,), offsets=(0, 16))},
    "unknown dtype": {"a": of(dtype="F32\n")},
    "long dtype": {"a": of(dtype="x" * 10**6)},
    "dtype that is none": {"a": of(dtype=None)},
    "a list": [of()],
    "number metadata": {"__metadata__": {"format": 3}, "a": of()},
    "list metadata": {"__metadata__": [], "a": of()},
    "text metadata": {"__metadata__": "", "a": of()},
    "a tensor as metadata": {"__metadata__": of()},
    "a name twice": b'{"a":{},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "a field twice": b'{"a":{"dtype":"F16","dtype":"F32","shape":[2],'
    b'"data_offsets":[0,8]}}',
    "metadata twice": b'{"__metadata__":{},"__metadata__":{},'
    b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "deep": b'{"a":' * 50_000,
    "deep lists": b'{"a":{"dtype":"F32","shape":' + b"[" * 90_000,
    "utf-16": json.dumps({"a": of()}).encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + json.dumps({"a": of()}).encode(),
    "no unicode": b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "a number too long": b'{"a":{"dtype":"F32","shape":[' + b"9" * 6000 + b"]}}",
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_is_refused(path, flaw):
    assert len(looked_at(path, file_of({"a": of()}, bytes(8)))) == 1
    assert looked_at(path, file_of(FLAWS[flaw], bytes(8))) is None


def test_a_header_of_the_most_bytes_is_refused_unread(path):
    content = struct.pack("<Q", 2**36) + b"{}"
    with path.open("wb") as file:  # a file of no blocks, larger than any memory
        file.write(content)
        file.truncate(2**36 + 100)
    with pytest.raises(UserError, match="truncated or not a safetensors file"):
        safetensors_io.read_header(path)
    path.unlink()


@tries(60)
@given(st.text(max_size=8) | st.sampled_from(["x" * 300, "a\0", "a\nb", "..", "/"]))
def test_a_file_that_is_none_is_named(path, name):
    for read in (safetensors_io.read_header, safetensors_io.read_json):
        with pytest.raises(UserError, match="no such file") as caught:
            read(path.parent / "nowhere" / name)
        assert str(caught.value).isprintable()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_waited_for(tmp_path, make):
    make(tmp_path / "x.safetensors")
    for read in (safetensors_io.read_header, safetensors_io.read_json):
        with pytest.raises(UserError, match="no such file"):
            read(tmp_path / "x.safetensors")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)


@tries(100)
@given(VALUES | st.fixed_dictionaries({"weight_map": VALUES}))
def test_any_index_names_files_beside_it_or_is_refused(path, value):
    index = path.parent / "model.safetensors.index.json"
    index.write_text(json.dumps(value))
    try:
        found = safetensors_io.shards(index)
    except UserError as error:
        assert str(error).startswith(str(index)) and str(error).isprintable()
    else:
        assert all(file.parent == path.parent for file in found)
        assert all(file.name.endswith(".safetensors") for file in found)


# --- pickles --------------------------------------------------------------------------


class Mark:
    """When it is unpickled, a file appears."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


class Heard:
    """The files that are opened and the pickles that are read, while it looks."""

    def __init__(self):
        self.events, self.looking = [], False
        sys.addaudithook(self._hear)

    def _hear(self, event, args):
        if self.looking and event in ("open", "pickle.find_class"):
            self.events.append((event, str(args[0])))


HEARD = Heard()


def pickles(folder, form):
    """Writes what torch.save writes, in one of its forms, under every usual name."""
    payload = pickle.dumps(Mark(folder / "ran"))
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (folder / part).mkdir()
        for ending in safetensors_io.PICKLES:
            for name in (f"{stem}{ending}", f"pytorch_model{ending}"):
                if form == "zip":
                    with zipfile.ZipFile(folder / part / name, "w") as file:
                        file.writestr("archive/data.pkl", payload)
                else:
                    (folder / part / name).write_bytes(payload)


@pytest.mark.parametrize("form", ["zip", "plain"])
def test_pickles_are_never_opened(tmp_path, form):
    pickle.loads(pickle.dumps(Mark(tmp_path / "trap"))).close()
    assert (tmp_path / "trap").exists()  # the trap works
    pickles(tmp_path, form)
    HEARD.events, HEARD.looking = [], True
    try:
        for part, stem in (
            ("unet", "diffusion_pytorch_model"),
            ("text_encoder", "model"),
        ):
            with pytest.raises(UserError, match="a pickle, which can run code and is"):
                safetensors_io.weight_files(tmp_path / part, stem)
        with pytest.raises(UserError):
            stable_diffusion.load(tmp_path)
        (tmp_path / "model_index.json").write_text("{}")
        with pytest.raises(UserError):
            stable_diffusion.load(tmp_path)
    finally:
        HEARD.looking = False
    assert not (tmp_path / "ran").exists()
    assert not [e for e in HEARD.events if e[0] == "pickle.find_class"]
    assert not [e for e in HEARD.events if e[1].endswith(safetensors_io.PICKLES)]


@tries(60)
@given(st.integers(0, 5), st.binary(max_size=30), st.booleans())
def test_a_pickle_called_safetensors_is_refused_and_does_not_run(
    path, protocol, more, as_zip
):
    ran = path.with_name("ran")
    content = pickle.dumps(Mark(ran), protocol) + more
    if as_zip:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", content)
        content = path.read_bytes()
    assert looked_at(path, content) is None
    assert looked_at(path, file_of(content)) is None
    assert not ran.exists()


def test_a_copy_of_a_model_with_pickles_beside_its_weights_does_not_run_them(
    tiny_folder, tmp_path
):
    for file in tiny_folder.rglob("*"):
        if file.is_file():
            copy = tmp_path / file.relative_to(tiny_folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    for part in ("unet", "vae", "text_encoder"):
        for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
            (tmp_path / part / name).write_bytes(pickle.dumps(Mark(tmp_path / "ran")))
    HEARD.events, HEARD.looking = [], True
    try:
        stable_diffusion.load(tmp_path)
    finally:
        HEARD.looking = False
    opened = [name for event, name in HEARD.events if event == "open"]
    assert any(name.endswith("model.safetensors") for name in opened)
    assert not any(name.endswith(".bin") for name in opened)
    assert not (tmp_path / "ran").exists()
