# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are whole or not there at all, and one writer a folder.

What is written goes to a hidden name beside its own, is flushed to the disk, and is
renamed: a process that is killed, or a full disk, leaves the old content, never half of
the new.
"""

import contextlib
import errno
import json
import os
import pathlib
import platform
import re
import shutil
from collections.abc import Iterator
from typing import Any

# What the user can do something about, and what.
CURES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EROFS: "use a folder that can be written",
    errno.EACCES: "use a folder that can be written",
    errno.EPERM: "use a folder that can be written",
    errno.EFBIG: "raise the limit on a file's size",
    errno.EIO: "check the disk",
}
_HOST = re.sub("[^A-Za-z0-9]+", "_", platform.node())


def describe_disk_error(error: OSError, path: Any = "") -> str | None:
    """Returns one line for a disk that is full or cannot be written; None of others."""
    if error.errno not in CURES:
        return None
    where = error.filename or path or "a file"
    cure = CURES[error.errno]
    return f"{where} cannot be written ({error.strerror}); {cure}, then run it again"


@contextlib.contextmanager
def atomic_write(path: pathlib.Path | str) -> Iterator[pathlib.Path]:
    """Yields a name beside `path` to write to; it becomes `path` if nothing is raised.

    The folder is made if it is missing. The name has the suffix of `path`.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    aside = path.with_name(f".{path.stem}.tmp-{_process_tag()}{path.suffix}")
    try:
        yield aside
        _flush(aside)
        aside.replace(path)
        _flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write(path: pathlib.Path | str, content: bytes | str) -> None:
    """Writes a file whole; text as UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_write(path) as aside:
        aside.write_bytes(data)


def write_json(path: pathlib.Path | str, value: Any) -> None:
    """Writes a value as JSON with sorted keys."""
    write(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


class AppendOnlyFile:
    """A file that grows line by line; no part of a line is ever left in it.

    Args: keep: of an existing file's lines, those to begin with.
    """

    def __init__(self, path: pathlib.Path, keep=lambda line: True):
        old = path.read_text().splitlines() if path.exists() else []
        write(path, "".join(line + "\n" for line in old if keep(line)))
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - see `close`

    def add(self, line: str) -> None:
        """Appends a line in one piece; OSError, and nothing of it, if it cannot."""
        size, data = os.fstat(self._file.fileno()).st_size, (line + "\n").encode()
        try:
            if self._file.write(data) != len(data):
                message = os.strerror(errno.ENOSPC)
                raise OSError(errno.ENOSPC, message, str(self._path))
        except OSError:
            os.ftruncate(self._file.fileno(), size)
            raise

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def atomic_folder(out: pathlib.Path | str) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling that becomes `out` on success, and is removed if not.

    An existing `out` is replaced whole, never mixed with the new files.
    """
    out = pathlib.Path(out).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(out)
    temp = out.parent / f".{out.name}.tmp-{_process_tag()}"
    temp.mkdir()
    try:
        yield temp
        mode = temp.stat().st_mode & 0o666  # as the user's umask has it
        for file in temp.rglob("*"):
            if file.is_file():
                file.chmod(mode)  # the safetensors library writes 0600
            _flush(file)
        old = out.parent / f".{out.name}.old-{_process_tag()}"
        if out.exists():
            out.rename(old)
        temp.rename(out)
        _flush(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _process_tag() -> str:
    return f"{_HOST}-{os.getpid()}"


def _flush(path: pathlib.Path) -> None:
    """Has the system write a file, or a folder's list of names, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # folders cannot be opened on some systems
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(path: pathlib.Path) -> None:
    """Removes what processes of this machine that were killed left beside `path`."""
    name = rf"\.{re.escape(path.name)}\.(tmp|old)-{_HOST}-(\d+)"
    if path.suffix:
        end = re.escape(path.suffix)
        name += rf"|\.{re.escape(path.stem)}\.(tmp)-{_HOST}-(\d+){end}"
    for other in path.parent.iterdir():
        found = re.fullmatch(name, other.name)
        if not found or _is_alive(int(found[2] or found[4])):
            continue
        if found[1] == "old" and not path.exists():
            other.rename(path)  # killed between two renames
        elif other.is_dir():
            shutil.rmtree(other, ignore_errors=True)
        else:
            other.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    if process == os.getpid():
        return False  # what it left itself: one thing is written at a time
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def cache_folder() -> pathlib.Path:
    """Returns the folder for what may be made again: GIFT_JAX_CACHE or ~/.cache."""
    named = os.environ.get("GIFT_JAX_CACHE") or "~/.cache/gift_jax"
    return pathlib.Path(named).expanduser()
