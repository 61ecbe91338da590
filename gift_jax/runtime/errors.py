# SPDX-License-Identifier: Apache-2.0
"""Errors that end in one line on stderr, and the checks that raise them."""

import difflib
import json
import math
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

LARGEST = 2**31 - 1  # of a config's whole numbers: JAX counts in 32 bits
MAX_SHOWN = 120  # characters of a wrong value in its message


class CommandExit(BaseException):
    """Ends a command with one line on stderr and an exit code of its own."""

    exit_code = 1


class UserError(ValueError, CommandExit):
    """A mistake in the config, the flags or the input.

    Characters that would break or garble the line, as in a file's name, are escaped.
    """

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(escaped(message))


class DiskError(UserError):
    """The disk is full, or cannot be written."""


class NonFiniteError(RuntimeError, CommandExit):
    """A loss, the norm of a gradient or a parameter is NaN or infinite."""

    exit_code = 3


class VerificationError(RuntimeError, CommandExit):
    """PyTorch's libraries do not load what is in a model's files, or draw it so."""

    def __init__(self, message: str):
        super().__init__(escaped(message))


class StoppedBySignal(CommandExit):
    """A signal ended the run, after a checkpoint if there was progress to save.

    Like KeyboardInterrupt it is no Exception, so that a library's `except Exception`
    does not swallow it.
    """

    def __init__(self, signum: int, saved: bool = True):
        after = " after a checkpoint" if saved else ""
        super().__init__(f"stopped by signal {int(signum)}{after}")
        self.exit_code = 128 + int(signum)


def install_command(extra: str) -> str:
    """Returns the command that installs an extra of the package."""
    return f"pip install -U '.[{extra}]' in a clone of gift_jax"


def choice(field: str, value: str, choices: Sequence[str]) -> str:
    """Returns value if it is one of choices, else raises a UserError listing them."""
    if value in choices:
        return value
    word = value[:MAX_SHOWN] if isinstance(value, str) else ""
    close = difflib.get_close_matches(word, choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    listed = ", ".join(choices[:12]) + (" ..." if len(choices) > 12 else "")
    raise UserError(f"{field}={shown(value)} is not one of: {listed}{hint}")


def at_least(field: str, value: float, low: float) -> None:
    """Raises a UserError unless value >= low, and a number that can be counted to."""
    check_number(field, value, low)
    if value < low:
        raise UserError(f"{field}={value} must be at least {low}; try {field}={low}")


def above(field: str, value: float, low: float, fix: float) -> None:
    """Raises a UserError unless value > low; fix: what to try."""
    check_number(field, value, fix)
    if value <= low:
        raise UserError(f"{field}={value} must be above {low}; try {field}={fix}")


def between(field: str, value: float, low: float, high: float) -> None:
    """Raises a UserError unless low <= value <= high."""
    at_least(field, value, low)
    if value > high:
        raise UserError(f"{field}={value} must be at most {high}; try {field}={high}")


def check_number(field: str, value: float, fix: float) -> None:
    if not isinstance(value, (int, float)):
        raise UserError(f"{field}={shown(value)} must be a number; try {field}={fix}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{field}={value} must be finite; try {field}={fix}")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise UserError(f"{field}={shown(value)} must be at most {LARGEST} from 0")


def shown(value: Any) -> str:
    """Returns what a message says of a value: one line, not too long, in quotes."""
    if not isinstance(value, str):
        return reprlib.repr(value)
    more = f" ... ({len(value)} characters)" if len(value) > MAX_SHOWN else ""
    return repr(value[:MAX_SHOWN]) + more


def one_line(text: Any) -> str:
    """Returns a path or a name as a message has it: what would garble a line escaped.

    A very long one loses its middle.
    """
    text = str(text)
    if len(text) > 4 * MAX_SHOWN:
        text = f"{text[: 2 * MAX_SHOWN]} ... {text[-2 * MAX_SHOWN :]}"
    return escaped(text)


def escaped(text: str) -> str:
    """Returns a text, line ends and other control characters as Python writes them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class RepeatsError(ValueError):
    """A name that appears twice."""


def check_once(names: Iterable[str]) -> None:
    """Raises RepeatsError naming the first name that appears twice."""
    seen = set()
    for name in names:
        if name in seen:
            raise RepeatsError(f"{shown(name)} appears twice")
        seen.add(name)


def parse_json(text: str) -> Any:
    """Returns what JSON of a stranger says; ValueError where it says a name twice."""

    def once(items):
        check_once(name for name, _ in items)
        return dict(items)

    return json.loads(text, object_pairs_hook=once)


def not_empty(field: str, prompts: Sequence[str]) -> None:
    """Raises UserError if a list of prompts, or names, is empty."""
    if not prompts:
        raise UserError(f"{field} is empty; give at least one")
