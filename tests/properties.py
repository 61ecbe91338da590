# SPDX-License-Identifier: Apache-2.0
"""What the property tests share: a strange input works, or is refused in one line."""

import os
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
