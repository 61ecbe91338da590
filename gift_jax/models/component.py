# SPDX-License-Identifier: Apache-2.0
"""What is known of a kind of component: a model family declares one for each it has."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gift_jax.models.config_keys import Keys


def _same(name: str) -> str:
    return name


class Kind(NamedTuple):
    """How one component of a model folder is built and read.

    Attributes:
      build: (config, dtype) -> Flax module. stem: of its weight files' names.
      extra_config: what its config.json says beside the module's fields.
      keys: of its config.json. nested: the key of a part that libraries read in place
        of the whole config.json, or "".
      other_name: what else a tensor is called, given its usual name.
      unread: names of tensors on disk that are of no use.
    """

    build: Callable
    stem: str
    extra_config: Mapping[str, Any]
    keys: Keys = Keys({})
    nested: str = ""
    other_name: Callable[[str], str] = _same
    unread: tuple[str, ...] = ()
