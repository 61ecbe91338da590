# SPDX-License-Identifier: Apache-2.0
"""A single file where a model folder is asked for: converted once, then found again."""

import hashlib
import os
from pathlib import Path

import filelock
from absl import logging

from gift_jax.models.sd.single_file import from_file
from gift_jax.runtime import files

_FORMAT = 1  # of what a file is converted to: raise it when that changes
_BLOCK = 2**24  # bytes


def is_single_file(path: Path) -> bool:
    """Whether a path is a safetensors file, which may hold a whole model."""
    return path.suffix == ".safetensors" and os.path.isfile(path)


def folder_of(file: Path) -> Path:
    """Returns the model folder that a single file becomes, in the folder of caches.

    It is named by the file's content. Several processes may ask at once.

    Raises: UserError for a file that `from_file.convert` does not take without options.
    """
    root = files.cache_folder() / "single_files"
    root.mkdir(parents=True, exist_ok=True)
    folder = root / _content(file, root)
    if not folder.is_dir():
        with filelock.FileLock(root / f".{folder.name}.lock"):
            if not folder.is_dir():
                logging.info("converting %s to %s", file, folder)
                from_file.convert(file, folder, from_file.Options())
    return folder


def _content(file: Path, root: Path) -> str:
    """Returns the first half of the sha256 of a file, 32 hex digits.

    Whole files are read once: the result is kept by path, size and time of change.
    """
    stat = file.stat()
    state = f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{_FORMAT}"
    record = root / f"{hashlib.sha256(state.encode()).hexdigest()[:32]}.sha256"
    if record.exists():
        return record.read_text().strip()
    digest = hashlib.sha256(f"{_FORMAT}\0".encode())
    with file.open("rb") as f:
        while block := f.read(_BLOCK):
            digest.update(block)
    files.write(record, digest.hexdigest()[:32] + "\n")
    return digest.hexdigest()[:32]
