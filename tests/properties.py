# SPDX-License-Identifier: Apache-2.0
"""What the property tests share: a strange input works, or is refused in one line."""

import os
import shutil
import sys

import hypothesis

from gift_jax.runtime.errors import UserError

MAX_MESSAGE = 1500  # characters


def tries(count):
    """Returns settings of so many examples, the same in every run, none slow."""
    return hypothesis.settings(
        max_examples=count, derandomize=True, database=None, deadline=5000
    )


def outcome(call):
    """Returns (what a call returns, "") or (None, the line that it is refused with).

    Any other exception fails the test, as does a message that is not one short
    printable line.
    """
    try:
        return call(), ""
    except UserError as error:
        message = str(error)
        assert message and message.isprintable() and len(message) < MAX_MESSAGE
        return None, message


def _replaced(content):
    """Returns a way to damage a file: what it holds becomes content(what it held)."""

    def damage(file):
        file.write_bytes(content(file.read_bytes()))

    return damage


def _folder(file):
    file.unlink()
    file.mkdir()


def _broken_link(file):
    file.unlink()
    file.symlink_to(file.parent / "no such file")


LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 12345\n"
)
DAMAGES = {  # what befalls a file: (how, words of the message that says so)
    "missing": (lambda file: file.unlink(), "no such file"),
    "empty": (_replaced(lambda data: b""), "is empty"),
    "lfs": (_replaced(lambda data: LFS_POINTER), "git lfs pull"),
    "conflict": (
        _replaced(
            lambda data: b"".join(
                [b"<<<<<<< HEAD\n", data, b"\n=======\n", data, b"\n>>>>>>> main\n"]
            )
        ),
        "",
    ),
    "half": (_replaced(lambda data: data[: len(data) // 2]), ""),
    "cut": (_replaced(lambda data: data[:-2]), ""),
    "start": (_replaced(lambda data: data[:5]), ""),
    "twice": (_replaced(lambda data: data + data), ""),
    "zeros": (_replaced(lambda data: bytes(len(data))), ""),
    "noise": (_replaced(lambda data: bytes(range(255, -1, -1)) * 4), ""),
    "list": (_replaced(lambda data: b"[1, 2]"), ""),
    "page": (_replaced(lambda data: b"<html><body>404 Not Found</body></html>"), ""),
    "folder": (_folder, "is a folder"),
    "link": (_broken_link, "broken link"),
}


def damaged(folder, name, kind, copy):
    """Returns a copy of a folder, one of its files damaged in a way of DAMAGES."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    DAMAGES[kind][0](copy / name)
    return copy


class _Audit:
    """Records this process's audit events of some kinds while it is active."""

    def __init__(self):
        self.events, self.active = [], False
        sys.addaudithook(self._record)

    def _record(self, event, args):
        if self.active and event in ("open", "pickle.find_class"):
            self.events.append((event, args[0]))


_AUDIT = _Audit()  # a hook cannot be removed


def audited(call):
    """Returns (what a call returns, paths that it opens, whether it unpickles)."""
    _AUDIT.events, _AUDIT.active = [], True
    try:
        result = call()
    finally:
        _AUDIT.active = False
    paths = {
        os.path.realpath(os.fsdecode(name))
        for event, name in _AUDIT.events
        if event == "open" and isinstance(name, (str, bytes))
    }
    paths = {path for path in paths if not path.endswith((".py", ".pyc"))}
    unpickles = any(event == "pickle.find_class" for event, _ in _AUDIT.events)
    return result, paths, unpickles
