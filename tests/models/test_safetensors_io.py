# SPDX-License-Identifier: Apache-2.0
"""Safetensors files: what is read is what was written, and damage is named."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gift_jax.models import safetensors_io, weight_files
from gift_jax.runtime.errors import UserError

VALUES = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.asarray(2.5, np.float16),
    "ids": np.arange(4)[None],
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.fixture
def file(tmp_path):
    """A small safetensors file by the library itself."""
    safetensors.numpy.save_file(VALUES, tmp_path / "x.safetensors", {"format": "pt"})
    return tmp_path / "x.safetensors"


def test_read_returns_what_the_library_wrote(file):
    entries = safetensors_io.read_header(file)
    assert entries.keys() == VALUES.keys()
    assert safetensors_io.read_metadata(file) == {"format": "pt"}
    for name, entry in entries.items():
        array = safetensors_io.read_tensor(name, entry, only_floats=False)
        assert array.dtype == VALUES[name].dtype
        np.testing.assert_array_equal(array, VALUES[name])
    with pytest.raises(UserError, match="x.safetensors: ids has dtype I64; must be"):
        safetensors_io.read_tensor("ids", entries["ids"])


def test_the_library_reads_what_is_written(tmp_path):
    values = VALUES | {"half": np.ones(3, ml_dtypes.bfloat16)}
    names = {np.dtype(dtype): name for name, dtype in safetensors_io.ALL_DTYPES.items()}
    safetensors_io.write_file(
        tmp_path / "y.safetensors",
        {k: (names[v.dtype], v.shape, lambda v=v: v) for k, v in values.items()},
        {"format": "pt"},
    )
    loaded = safetensors.numpy.load_file(tmp_path / "y.safetensors")
    assert loaded.keys() == values.keys()
    for name, array in values.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def rewrite(file, change):
    """Applies change(header dict) to a file's header and leaves the data alone."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = change(header)
    text = (json.dumps(header) if text is None else text).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def set_field(name, field, value):
    return lambda header: header[name].update({field: value})


def overlap(header):
    header["c"] = header["b"]


@pytest.mark.parametrize(
    "change, message",
    [
        (set_field("b", "shape", [2, 4]), "b holds 24 bytes, but F32 of shape"),
        (set_field("b", "shape", [-2, -3]), "b has no valid dtype, shape"),
        (set_field("b", "shape", "23"), "b has no valid dtype, shape"),
        (set_field("b", "shape", [2**62, 2**62]), "b holds 24 bytes"),
        (set_field("b", "dtype", "F31"), "b has dtype F31; must be one of F32"),
        (set_field("b", "dtype", ["F32"]), "b has no valid dtype"),
        (set_field("b", "dtype", "F64"), "b holds 24 bytes, but F64"),
        (set_field("b", "data_offsets", [24, 0]), "b holds -24 bytes"),
        (set_field("b", "data_offsets", [0.0, 24.0]), "b has no valid dtype"),
        (set_field("b", "data_offsets", [0]), "b has no valid dtype"),
        (set_field("b", "data_offsets", [2**40, 2**40 + 24]), "begins at byte"),
        (lambda header: header.update(b=3), "b has no valid dtype"),
        (overlap, "begins at byte"),
        (lambda header: header.pop("ids") and None, "begins at byte|ends at byte"),
        (lambda header: "[1, 2]", "its header is not JSON"),
        (lambda header: '{"a": {}, "a": {}}', "'a' appears twice"),
        (lambda header: "[" * 100_000, "its header is not JSON"),
        (lambda header: "\x00\xff", "its header is not JSON"),
    ],
)
def test_a_damaged_header_is_one_line(file, change, message):
    rewrite(file, change)
    with pytest.raises(UserError, match=message) as caught:
        safetensors_io.read_header(file)
    assert "x.safetensors" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda raw: raw[:-1], "truncated"),
        (lambda raw: raw + b"\0", "its last tensor ends at byte"),
        (lambda raw: raw[:20], "truncated or not a safetensors file"),
        (lambda raw: raw[:5], "truncated or not a safetensors file"),
        (lambda raw: b"", "is empty; copy it again"),
        (lambda raw: b"\xff" * len(raw), "truncated or not a safetensors file"),
        (lambda raw: b"PK\x03\x04" + raw, "truncated or not a safetensors file"),
    ],
)
def test_a_damaged_file_is_one_line(file, spoil, message):
    safetensors_io.read_header(file)
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(UserError, match=message) as caught:
        safetensors_io.read_header(file)
    assert "x.safetensors" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "weight_map, message",
    [
        ({"a": "../x.safetensors"}, "names the shard '../x.safetensors'"),
        ({"a": "/x.safetensors"}, "names the shard"),
        ({"a": "model.bin"}, "names the shard 'model.bin'"),
        ({}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
def test_an_index_names_files_beside_it(tmp_path, weight_map, message):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
        weight_files.weight_files(tmp_path, "model")
