# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are whole or not there at all.

Content is written to a hidden temporary sibling, flushed to the disk and renamed: a
killed process or a full disk leaves the old content, never half of the new. A temporary
name contains the host and the process, because several processes may write to one
folder; the next write of the same target removes what killed processes have left.
"""

import contextlib
import errno
import json
import os
import pathlib
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

# Errors of the disk that the user can do something about, and the remedy.
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
    """Returns one line on a disk that is full or read-only; None for other errors."""
    if error.errno not in CURES:
        return None
    where = error.filename or path or "a file"
    cure = CURES[error.errno]
    return f"{where} cannot be written ({error.strerror}); {cure}, then run it again"


@contextlib.contextmanager
def atomic_write(path: pathlib.Path | str) -> Iterator[pathlib.Path]:
    """Yields a temporary path to write to, which replaces `path` if nothing is raised.

    The folder is created if it is missing. The temporary path has the suffix of `path`.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    aside = _sibling(path, "tmp", path.suffix)
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
    """A file that grows by whole lines.

    Args: keep: which lines of an existing file to keep.
    """

    def __init__(self, path: pathlib.Path, keep: Callable[[str], bool]):
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
    """Yields a temporary folder, which replaces `out` whole if nothing is raised."""
    out = pathlib.Path(out).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(out)
    temp, old = _sibling(out, "tmp"), _sibling(out, "old")
    temp.mkdir()
    try:
        yield temp
        mode = temp.stat().st_mode & 0o666  # as the user's umask has it
        for file in temp.rglob("*"):
            if file.is_file():
                file.chmod(mode)  # the safetensors library writes 0600
            _flush(file)
        if out.exists():
            out.rename(old)
        temp.rename(out)
        _flush(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _sibling(path: pathlib.Path, role: str, suffix: str = "") -> pathlib.Path:
    return path.with_name(f".{path.name}.{role}-{_HOST}-{os.getpid()}{suffix}")


def _flush(path: pathlib.Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # folders cannot be opened on some systems
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale(path: pathlib.Path) -> None:
    """Removes what killed processes of this machine have left beside `path`."""
    pattern = rf"\.{re.escape(path.name)}\.(tmp|old)-{_HOST}-(\d+)(\.[^.]*)?"
    for sibling in path.parent.iterdir():
        match = re.fullmatch(pattern, sibling.name)
        if not match or _is_other_process(int(match[2])):
            continue
        if match[1] == "old" and not path.exists():
            sibling.rename(path)  # killed between the two renames of a folder
        elif sibling.is_dir():
            shutil.rmtree(sibling, ignore_errors=True)
        else:
            sibling.unlink(missing_ok=True)


def _is_other_process(pid: int) -> bool:
    """Whether a process other than this one is alive under that number."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def cache_folder() -> pathlib.Path:
    """Returns the folder of the caches: GIFT_JAX_CACHE, or ~/.cache/gift_jax."""
    path = os.environ.get("GIFT_JAX_CACHE") or "~/.cache/gift_jax"
    return pathlib.Path(path).expanduser()
