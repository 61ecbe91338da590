# SPDX-License-Identifier: Apache-2.0
"""Objects by name: a module of a room, or a stranger's by its dotted path."""

import importlib
from collections.abc import Sequence
from typing import Any

from gift_jax.runtime.errors import UserError, choice, shown


def load_object(
    field: str, name: str, package: str | None, names: Sequence[str], attribute: str
) -> Any:
    """Returns `attribute` of the module `package.name`, or of a dotted path.

    Args: field: to name in errors. names: the modules of `package` that have one.
    Raises: UserError for a name that is not one of `names` and no module that has it.
    """
    if "." not in name:
        choice(field, name, names)
        return getattr(importlib.import_module(f"{package}.{name}"), attribute)
    try:
        return getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{field}={shown(name)}: no module of that path has {attribute} ({error}); "
            f"name one, or one of: {', '.join(names)}"
        ) from error
