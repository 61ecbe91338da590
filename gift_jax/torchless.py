# SPDX-License-Identifier: Apache-2.0
"""Commands start without PyTorch, also where it is installed."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Within it PyTorch counts as not installed, if a command of gift_jax runs.

    For imports of libraries that would import it wherever they find it, which takes
    longer than all the rest of a command's start. Who imports gift_jax as a library may
    want those libraries with it.
    """
    if "torch" in sys.modules or not _a_command():
        yield
        return
    sys.modules["torch"] = None
    try:
        yield
    finally:
        del sys.modules["torch"]


def _a_command() -> bool:
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m`
    return spec is not None and spec.name.startswith("gift_jax.")
