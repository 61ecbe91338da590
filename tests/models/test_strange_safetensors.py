# SPDX-License-Identifier: Apache-2.0
"""Weight files from strangers: read exactly or refused in a line, never unpickled."""

import json
import math
import os
import pathlib
import pickle
import shutil
import struct
import tempfile
import zipfile

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from properties import audited, outcome, tries

from gift_jax.models import safetensors_io, weight_files
from gift_jax.models.sd import stable_diffusion

DTYPES = safetensors_io.ALL_DTYPES


@pytest.fixture(scope="module")
def path():
    """Where a file is written over and over."""
    with tempfile.TemporaryDirectory() as folder:
        yield pathlib.Path(folder, "odd.safetensors")


def file_of(header, data=b""):
    """Returns a file of a header, as it is or as JSON, and of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def read(path, content):
    """Returns {name: array}, or None if the file is refused.

    Asserts what holds of whatever is accepted: every byte of the file belongs to one
    tensor or to the header, and arrays are as the header says.
    """
    path.write_bytes(content)
    entries, message = outcome(lambda: safetensors_io.read_header(path))
    if entries is None:
        assert str(path) in message
        return None
    start = 8 + int.from_bytes(content[:8], "little")
    spans = sorted((entry.begin, entry.end) for entry in entries.values())
    ends = [start, *(end for _, end in spans)]
    assert [begin for begin, _ in spans] + [len(content)] == ends
    arrays = {}
    for name, entry in entries.items():
        array = safetensors_io.read_tensor(name, entry, only_floats=False)
        assert array.shape == entry.shape and array.dtype == DTYPES[entry.dtype]
        assert array.tobytes() == content[entry.begin : entry.end]
        arrays[name] = array
    return arrays


NAMES = st.text(max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
TENSORS = st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES))


@tries(150)
@given(TENSORS, st.none() | st.dictionaries(st.text(), st.text(), max_size=3))
def test_what_is_written_is_read(path, tensors, metadata):
    arrays = {
        name: np.zeros(math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize, np.uint8)
        .view(DTYPES[dtype])
        .reshape(shape)
        for name, (dtype, shape) in tensors.items()
    }
    entries = {n: (*how, lambda n=n: arrays[n]) for n, how in tensors.items()}
    safetensors_io.write_file(path, entries, metadata)
    result = read(path, path.read_bytes())
    assert {name: (a.dtype, a.shape) for name, a in result.items()} == {
        name: (a.dtype, a.shape) for name, a in arrays.items()
    }
    assert safetensors_io.read_metadata(path) == (metadata or {})


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
CHANGE = st.tuples(st.integers(0, LENGTH + 7), st.integers(0, 255))


@tries(150)
@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=20))
def test_a_file_cut_or_longer_is_refused(path, size, more):
    assert len(read(path, GOOD)) == 4
    assert read(path, GOOD[:size]) is None
    assert read(path, GOOD + more) is None


@tries(300)
@given(st.lists(CHANGE, max_size=4))
def test_changed_bytes_are_read_as_the_library_reads_them(path, changes):
    content = bytearray(GOOD)
    for at, byte in changes:
        content[at] = byte
    result = read(path, bytes(content))
    if result is not None:
        tensors = dict(safetensors.deserialize(bytes(content)))
        assert {n: tuple(t["shape"]) for n, t in tensors.items()} == {
            n: a.shape for n, a in result.items()
        }


SIZES = st.sampled_from([0, 1, 2, 4, 8, -1, 2**31, 2**62, 2**63, 2**64, 10**40])
ODD = st.sampled_from([None, True, 0.0, 1.5, float("nan"), "4", "", [], {}, [[1]]])
SHAPE = st.lists(SIZES | ODD, max_size=4) | ODD | st.just([2**62] * 64)
OFFSETS = st.lists(SIZES | ODD, max_size=3) | st.tuples(SIZES, SIZES) | ODD
KINDS = st.sampled_from([*sorted(DTYPES), "F31", "F32\n", "x" * 5000]) | ODD
FIELDS = {"dtype": KINDS, "shape": SHAPE, "data_offsets": OFFSETS}
TENSOR = st.fixed_dictionaries({}, optional=FIELDS) | ODD
HEADERS = st.dictionaries(
    st.sampled_from(["a", "", "x\ny\x1b[31m", "\udcff", "n" * 5000, "__metadata__"]),
    TENSOR,
    max_size=3,
)


@tries(400)
@given(HEADERS, st.integers(0, 64))
def test_any_header_is_read_or_refused(path, header, size):
    read(path, file_of(header, bytes(size)))


@tries(100)
@given(st.binary(max_size=80), st.integers(0, 2**64 - 1), st.booleans())
def test_noise_and_huge_header_lengths_are_read_or_refused(path, noise, length, small):
    read(path, struct.pack("<Q", length % 100 if small else length) + noise)


def tensor(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


FLAWS = {
    "overlapping": {"a": tensor(), "b": tensor(offsets=(4, 12))},
    "a gap": {"a": tensor(), "b": tensor(offsets=(12, 20))},
    "backwards": {"a": tensor(offsets=(8, 0))},
    "beyond the end": {"a": tensor(shape=(2**40,), offsets=(0, 2**42))},
    "a product that overflows to 2": {"a": tensor(shape=(2**63 + 1, 2))},
    "a product of 2 to the 64": {"a": tensor(shape=(2**32, 2**32), offsets=(0, 0))},
    "millions of sides": {"a": tensor(shape=(2**62,) * 300_000)},
    "negative sides": {"a": tensor(shape=(-1, -2))},
    "a name twice": b'{"a":{},"a":' + json.dumps(tensor()).encode() + b"}",
    "deep": b'{"a":' * 50_000,
    "deep lists": b'{"a":{"dtype":"F32","shape":' + b"[" * 90_000,
    "a number too long": b'{"a":{"dtype":"F32","shape":[' + b"9" * 6000 + b"]}}",
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_is_refused(path, flaw):
    assert len(read(path, file_of({"a": tensor()}, bytes(8)))) == 1
    assert read(path, file_of(FLAWS[flaw], bytes(8))) is None


def test_a_header_larger_than_memory_is_refused_unread(path):
    with path.open("wb") as file:  # a file of no blocks
        file.write(struct.pack("<Q", 2**36) + b"{}")
        file.truncate(2**36 + 100)
    assert outcome(lambda: safetensors_io.read_header(path))[1]
    path.unlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, str])
def test_what_is_not_a_file_is_not_waited_for(tmp_path, make):
    make(tmp_path / "x.safetensors")
    for reader in (safetensors_io.read_header, safetensors_io.read_json):
        assert outcome(lambda reader=reader: reader(tmp_path / "x.safetensors"))[1]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=9), v),
    max_leaves=6,
)


@tries(100)
@given(JSON | st.fixed_dictionaries({"weight_map": JSON}))
def test_any_index_names_files_beside_it_or_is_refused(path, value):
    index = path.parent / "model.safetensors.index.json"
    index.write_text(json.dumps(value))
    files, _ = outcome(lambda: weight_files.shards(index))
    assert all(file.parent == path.parent for file in files or ())


class Mark:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickles_are_never_opened(tiny_folder, tmp_path):
    payload = pickle.dumps(Mark(tmp_path / "ran"))
    pickle.loads(payload).close()
    (tmp_path / "ran").unlink()  # the trap works
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    for folder in (model / "unet", model / "text_encoder"):
        for ending in safetensors_io.PICKLES:
            (folder / f"pytorch_model{ending}").write_bytes(payload)
            with zipfile.ZipFile(folder / f"model{ending}", "w") as file:
                file.writestr("archive/data.pkl", payload)
    (model / "vae" / "diffusion_pytorch_model.bin").write_bytes(payload)
    loaded, opened, unpickles = audited(lambda: stable_diffusion.load(model))
    assert loaded and any(path.endswith(".safetensors") for path in opened)
    for weights in model.rglob("*.safetensors"):
        weights.unlink()
    (_, message), paths, more = audited(
        lambda: outcome(lambda: stable_diffusion.load(model))
    )
    assert message and not unpickles and not more and not (tmp_path / "ran").exists()
    assert not any(p.endswith(safetensors_io.PICKLES) for p in opened | paths)


@tries(60)
@given(st.integers(0, 5), st.binary(max_size=30))
def test_a_pickle_called_safetensors_does_not_run(path, protocol, more):
    content = pickle.dumps(Mark(path.with_name("ran")), protocol) + more
    assert read(path, content) is None and read(path, file_of(content)) is None
    assert not path.with_name("ran").exists()
