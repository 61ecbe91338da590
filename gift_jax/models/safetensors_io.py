# SPDX-License-Identifier: Apache-2.0
"""Tensors on disk: safetensors files, PyTorch's names and layouts.

Pickles are never opened. A parameter is named by its Flax path,
"down_blocks_0/attentions_0/.../attn2/to_k/kernel"; on disk it has PyTorch's name,
"down_blocks.0.attentions.0....attn2.to_k.weight", and PyTorch's layout.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from gift_jax.runtime import damage, files
from gift_jax.runtime.errors import UserError, one_line, parse_json

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_OTHER_DTYPES = {  # kept as they are, never computed with
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
ALL_DTYPES = DTYPES | _OTHER_DTYPES
_MAX_DIMS = 64  # NumPy's
_MAX_HEADER = 100 * 2**20  # bytes, the format's own limit


class Entry(NamedTuple):
    file: Path
    dtype: str
    shape: tuple
    begin: int  # bytes from the start of the file
    end: int


_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}

_NUMBERED = ("linear_", "wi_")  # beginnings of names that end in a number there, too


def torch_name(path):
    """Returns the PyTorch name of a Flax path "a/b_0/kernel"."""
    *modules, leaf = path.split("/")
    parts = [
        m if m.startswith(_NUMBERED) else re.sub(r"_(\d+)$", r".\1", m) for m in modules
    ]
    if parts and re.search(r"(en|de)coder/mid_block/attentions_\d+/", path):
        new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        parts[-1] = new.get(parts[-1], parts[-1])
    return ".".join([*parts, _LEAVES.get(leaf, leaf)])


def old_name(name):
    """The name that SD 1.x files, and diffusers before 0.18, give VAE attention."""
    for new, old in (
        (".to_q.", ".query."),
        (".to_k.", ".key."),
        (".to_v.", ".value."),
        (".to_out.0.", ".proj_attn."),
    ):
        name = name.replace(new, old)
    return name


def to_torch_layout(path, array):
    """Returns the array laid out as PyTorch stores the parameter of this Flax path."""
    if path.endswith("/kernel"):
        return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return array


def torch_shape(path, shape):
    return to_torch_layout(path, np.empty(shape, np.bool_)).shape


def from_torch_layout(path, array):
    if path.endswith("/kernel"):
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return array


def read_header(file):
    """Returns {name: Entry} of one safetensors file, every field checked.

    Raises: UserError naming the file, and the tensor where one is to blame, if it is
      missing, truncated, padded, or not a safetensors file.
    Source: https://github.com/huggingface/safetensors, "Format".
    """
    entries, _ = _read_header(file)
    return entries


def read_metadata(file):
    """Returns the str -> str metadata in a safetensors header, {} if it has none."""
    return _read_header(file)[1]


def _read_header(file):
    said = one_line(file)
    damage.check_file(file)
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8 or length > _MAX_HEADER:
            raise UserError(
                f"{said}: truncated or not a safetensors file; copy it again"
            )
        raw = f.read(length)
    try:
        header = parse_json(raw.decode())
        if not isinstance(header, dict):
            raise ValueError(f"a {type(header).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{said}: its header is not JSON ({error})") from None
    metadata, start = header.pop("__metadata__", None), 8 + length
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise UserError(
            f"{said}: its __metadata__ is not texts by name; the header is damaged, "
            "copy the file again"
        )
    entries = {name: _entry(file, name, header[name], start) for name in header}
    end = start
    for name in sorted(entries, key=lambda name: entries[name][3:]):
        if entries[name].begin != end:
            raise UserError(
                f"{said}: {one_line(name)} begins at byte {entries[name].begin}, but "
                f"the tensor before it ends at {end}; the header is damaged, copy the "
                "file again"
            )
        end = entries[name].end
        if end > size:
            raise UserError(
                f"{said}: truncated: {size} bytes, but {one_line(name)} ends at byte "
                f"{end}; copy it again"
            )
    if end != size:
        raise UserError(
            f"{said}: {size} bytes, but its last tensor ends at byte {end}; "
            "copy it again"
        )
    return entries, metadata


def _entry(file, name, info, start):
    """Returns the Entry of one header item, its bytes agreeing with its shape."""
    try:
        dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
        whole = isinstance(dtype, str) and isinstance(shape, list)
        whole = whole and len(shape) <= _MAX_DIMS
        counts = [*shape, begin, end] if whole else []
        whole &= all(type(n) is int and 0 <= n < 2**63 for n in counts)
        if whole and 0 in shape:  # NumPy wants to count the bytes without the 0
            whole = math.prod(n or 1 for n in shape) < 2**59
    except (TypeError, KeyError, ValueError):
        whole = False
    at = f"{one_line(file)}: {one_line(name)}"
    if not whole:
        raise UserError(
            f"{at} has no valid dtype, shape and data_offsets; the header is "
            "damaged, copy the file again"
        )
    if dtype not in ALL_DTYPES:
        known = ", ".join(DTYPES)
        raise UserError(f"{at} has dtype {one_line(dtype)}; must be one of {known}")
    count = math.prod(shape) * np.dtype(ALL_DTYPES[dtype]).itemsize
    if end - begin != count:
        raise UserError(
            f"{at} holds {end - begin} bytes, but {dtype} of shape "
            f"{one_line(shape)} takes {count}; the header is damaged, copy the file "
            "again"
        )
    return Entry(file, dtype, tuple(shape), start + begin, start + end)


def read_tensor(name, entry, *, only_floats=True):
    """Returns one tensor as it is in the file, a NumPy array of its own.

    Raises: UserError for a dtype that weights cannot have, if `only_floats`.
    """
    known = DTYPES if only_floats else ALL_DTYPES
    if entry.dtype not in known:
        raise UserError(
            f"{one_line(entry.file)}: {one_line(name)} has dtype {entry.dtype}; must "
            f"be one of {', '.join(known)}; load the model with diffusers, in one of "
            "these, and save_pretrained it"
        )
    raw = np.fromfile(entry.file, np.uint8, entry.end - entry.begin, offset=entry.begin)
    return raw.view(known[entry.dtype]).reshape(entry.shape)


def cast(name, array, dtype):
    """Returns the array as a dtype of `DTYPES`, or as it is if not a float.

    Raises: UserError if a finite value becomes infinite.
    """
    disk_dtype = np.dtype(DTYPES[dtype])
    if array.dtype == disk_dtype or array.dtype not in map(np.dtype, DTYPES.values()):
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore"):
        result = np.ascontiguousarray(array, disk_dtype)
    if not np.isfinite(result.astype(np.float32)).all():
        raise UserError(
            f"{name}: not finite as {dtype}; keep it in a wider dtype (F32 or BF16)"
        )
    return result


def write_file(file, tensors, metadata=None):
    """Writes a safetensors file, one tensor in memory at a time.

    Args: tensors: {name: (dtype name, shape, function that returns the array)}. The
      order of names is kept; the safetensors library would hold every tensor twice.
      metadata: str -> str.
    Source: https://github.com/huggingface/safetensors, "Format".
    """
    header, end = {}, 0
    if metadata:
        header["__metadata__"] = metadata
    for name, (dtype, shape, _) in tensors.items():
        size = math.prod(shape) * np.dtype(ALL_DTYPES[dtype]).itemsize
        offsets = [end, end + size]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with Path(file).open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape, read) in tensors.items():
            array = np.ascontiguousarray(read(), ALL_DTYPES[dtype])
            if array.size != math.prod(shape):
                raise ValueError(f"{name} has {array.size} values, not {shape}")
            f.write(array.reshape(-1).view(np.uint8))


def write_float32(path, arrays, metadata=None):
    """Writes {name: array} as float32 in one file, whole or not at all.

    Args: metadata: str -> str, for the header.
    """
    table = {
        name: ("F32", array.shape, lambda array=array: array)
        for name, array in arrays.items()
    }
    with files.atomic_write(path) as aside:
        write_file(aside, table, {"format": "pt"} | (metadata or {}))


def read_json(file):
    """Returns a JSON file's object; UserError if it is missing or damaged."""
    damage.check_file(file)
    data = Path(file).read_bytes()
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        damage.check_merged(file, data.decode(errors="replace"))
        reason = one_line(error)
        raise UserError(f"{file}: not valid JSON ({reason}); copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: must hold a JSON object, not {type(value).__name__}")
    return value
