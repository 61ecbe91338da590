# SPDX-License-Identifier: Apache-2.0
"""Which keys of a component's config.json are computed, ignored or refused.

A key that changes what PyTorch computes is computed here too, or refused by its name:
a picture is PyTorch's picture, or there is none.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gift_jax.runtime.errors import LARGEST, UserError, one_line, shown


class Rule(NamedTuple):
    """The values that a key may have. text: what they are, after "must be"."""

    allows: Callable[[Any], bool]
    text: str


class Keys(NamedTuple):
    """The keys of one component's config.json.

    Attributes:
      rules: of keys that are computed, or that must have one value.
      harmless: keys that PyTorch's class ignores too, or that change no output.
      defaults: of keys that the file may leave out; as PyTorch's class has them.
      conflict: given all values, says in words what does not fit together, or "".
      complete: whether any other key, unless null, is refused.
    """

    rules: Mapping[str, Rule]
    harmless: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = {}
    conflict: Callable[[Mapping[str, Any]], str] = lambda values: ""
    complete: bool = False


def check(keys: Keys, config: Mapping[str, Any], file: Any) -> None:
    """Raises UserError naming the key that asks for what the module does not compute.

    Args: config: the content of config.json. file: its path, for the message.
    """
    label = one_line(file)
    for name, value in config.items():
        rule = keys.rules.get(name)
        if rule and not rule.allows(value):
            raise UserError(
                f"{label}: {one_line(name)}={shown(value)} is not supported; must be "
                f"{rule.text}"
            )
        unknown = not rule and name not in keys.harmless and not name.startswith("_")
        if keys.complete and unknown and value is not None:
            raise UserError(
                f"{label}: {one_line(name)}={shown(value)} is of no known key, so what "
                "it changes is not computed; delete it if the library that reads it "
                "ignores it, too"
            )
    conflict = keys.conflict({**keys.defaults, **config})
    if conflict:
        raise UserError(f"{label}: {conflict}")


# --- rules ----------------------------------------------------------------------------


def only(*values: Any) -> Rule:
    """One of these values."""
    return Rule(lambda value: value in values, " or ".join(map(repr, values)))


def whole(low: int = 1, high: int = LARGEST) -> Rule:
    """A whole number from low to high."""
    text = f"a whole number of at least {low}"
    if high < LARGEST:
        text = f"a whole number from {low} to {high}"
    return Rule(lambda value: type(value) is int and low <= value <= high, text)


def number(above: float = -math.inf) -> Rule:
    """A finite number above another."""
    text = "a number" if above == -math.inf else f"a number above {above:g}"

    def allows(value):
        is_number = type(value) in (int, float) and abs(value) < LARGEST
        return is_number and above < value

    return Rule(allows, text)


def flag() -> Rule:
    return Rule(lambda value: isinstance(value, bool), "true or false")


def entries(rule: Rule, count: int = 0) -> Rule:
    """A list of values that a rule allows: so many, or at least one."""

    def allows(value):
        if not isinstance(value, list) or not value or count not in (0, len(value)):
            return False
        return all(map(rule.allows, value))

    many = f"a list of {count}" if count else "a list"
    return Rule(allows, f"{many}, each {rule.text}")


def either(*rules: Rule) -> Rule:
    """What any of the rules allows."""
    return Rule(
        lambda value: any(rule.allows(value) for rule in rules),
        ", or ".join(rule.text for rule in rules),
    )
