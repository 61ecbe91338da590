# SPDX-License-Identifier: Apache-2.0
"""Tensors on disk: safetensors files, PyTorch's names and layouts, whole folders.

Pickles are never opened. A parameter is named by its Flax path,
"down_blocks_0/attentions_0/.../attn2/to_k/kernel"; on disk it has PyTorch's name,
"down_blocks.0.attentions.0....attn2.to_k.weight", and PyTorch's layout.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from gift_jax.config import UserError

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class Entry(NamedTuple):
    file: Path
    dtype: str
    shape: tuple
    begin: int  # bytes from the start of the file
    end: int


# --- names ----------------------------------------------------------------------------


def torch_name(path):
    """Returns the PyTorch name of a Flax path "a/b_0/kernel"."""
    *modules, leaf = path.split("/")
    parts = [
        m if m.startswith("linear_") else re.sub(r"_(\d+)$", r".\1", m) for m in modules
    ]
    if parts and re.search(r"(en|de)coder/mid_block/attentions_\d+/", path):
        new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        parts[-1] = new.get(parts[-1], parts[-1])
    leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(
        leaf, leaf
    )
    return ".".join([*parts, leaf])


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


# --- safetensors files ----------------------------------------------------------------


def read_header(file):
    """Returns {name: Entry} of one safetensors file, checked against its length.

    Raises: UserError if it is missing, truncated, or not a safetensors file.
    Source: https://github.com/huggingface/safetensors, "Format".
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; the model folder is incomplete")
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(
                f"{file}: truncated or not a safetensors file; copy it again"
            )
        try:
            header = json.loads(f.read(length))
        except ValueError as error:
            raise UserError(f"{file}: its header is not JSON ({error})") from None
    header.pop("__metadata__", None)
    start, entries = 8 + length, {}
    for name, info in header.items():
        begin, end = (start + offset for offset in info["data_offsets"])
        if end > size:
            raise UserError(
                f"{file}: truncated: {size} bytes, but {name} ends at byte {end}; "
                "copy it again"
            )
        entries[name] = Entry(file, info["dtype"], tuple(info["shape"]), begin, end)
    return entries


def read_tensor(name, entry):
    if entry.dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise UserError(
            f"{entry.file}: {name} has dtype {entry.dtype}; must be one of {known}"
        )
    raw = np.memmap(entry.file, np.uint8, "r")[entry.begin : entry.end]
    return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)


def weight_files(directory, stem):
    """Returns the safetensors files of a component: one, its shards, or its variant.

    Raises: UserError if there is none; says so if there are only pickles.
    """
    single = directory / f"{stem}.safetensors"
    if single.is_file():
        return [single]
    index = directory / f"{stem}.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(read_json(index)["weight_map"].values()))
        return [directory / shard for shard in shards]
    variants = sorted(directory.glob(f"{stem}.*.safetensors"))
    if len(variants) == 1:
        return variants
    pickles = [p.name for p in directory.glob("*") if p.suffix in PICKLES]
    if pickles:
        raise UserError(
            f"{directory}: has only {pickles[0]}, a pickle, which can run code and is "
            "never loaded; save the model as safetensors "
            "(save_pretrained(..., safe_serialization=True))"
        )
    raise UserError(f"{directory}: no {single.name}; is this a diffusers model folder?")


def read_json(file):
    """Returns a JSON file's object; UserError if it is missing or malformed."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file}: no such file; is this a model folder?") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None


# --- folders --------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_folder(out):
    """Yields a temporary sibling that becomes `out` on success, and is removed if not.

    An existing `out` is replaced whole, never mixed with the new files.
    """
    out = Path(out).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    temp = out.parent / f".{out.name}.tmp-{os.getpid()}"
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir()
    try:
        yield temp
        mode = temp.stat().st_mode & 0o666  # as the user's umask has it
        for file in [p for p in temp.rglob("*") if p.is_file()]:
            file.chmod(mode)  # the safetensors library writes 0600
            with file.open("rb") as f:
                os.fsync(f.fileno())
        old = out.parent / f".{out.name}.old-{os.getpid()}"
        if out.exists():
            out.rename(old)
        temp.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
