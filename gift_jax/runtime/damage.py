# SPDX-License-Identifier: Apache-2.0
"""Files that are not what their names say, and what to do about them."""

import os
import re
from pathlib import Path
from typing import Any

from gift_jax.runtime.errors import UserError, one_line

_LFS = b"version https://git-lfs.github.com/spec/"
_MERGE_MARK = re.compile(r"^(<{7} |>{7} |={7}$)", re.MULTILINE)


def is_pointer(head: bytes) -> bool:
    """Whether a file's first bytes are those of a git-lfs pointer."""
    return head.startswith(_LFS)


def merge_mark_line(text: str) -> int:
    """Returns the number of the first line with a merge conflict's mark, 0 if none."""
    mark = _MERGE_MARK.search(text)
    return text.count("\n", 0, mark.start()) + 1 if mark else 0


def check_file(file: Any) -> None:
    """Raises UserError unless a path is a file with content, no git-lfs pointer.

    Of any name, unlike pathlib's; a pipe, which waits for a writer, is not opened.
    """
    label = one_line(file)
    if os.path.isdir(file):
        raise UserError(f"{label}: is a folder, not a file; copy the file again")
    if not os.path.lexists(file):
        raise UserError(f"{label}: no such file; the model folder is incomplete")
    if not os.path.isfile(file):
        raise UserError(
            f"{label}: a broken link, or no plain file; fetch or copy it again"
        )
    try:
        with Path(file).open("rb") as f:
            head = f.read(len(_LFS))
    except OSError as error:
        raise UserError(f"{label}: cannot be read ({error.strerror})") from None
    if not head:
        raise UserError(f"{label}: is empty; copy it again")
    if is_pointer(head):
        raise UserError(
            f"{label}: a git-lfs pointer in place of the file; install git-lfs and "
            "run `git lfs pull` in the model's repository"
        )


def check_merged(file: Any, text: str) -> None:
    """Raises UserError if a text file's content holds the marks of a merge conflict."""
    line = merge_mark_line(text)
    if line:
        raise UserError(
            f"{one_line(file)}: has the marks of a merge conflict in line {line}; "
            "resolve it, or copy the file again"
        )
