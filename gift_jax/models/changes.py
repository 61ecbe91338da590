# SPDX-License-Identifier: Apache-2.0
"""What a gate writes into a network's parameters, and where."""

import jax
import numpy as np

Flat = dict[str, jax.Array]


class Changes:
    """Parameters that are written to, and where.

    Attributes: params: flat, as they are now. owned: path -> bool array, True where
    written.
    """

    def __init__(self, network: Flat):
        self.params = dict(network)
        self.owned: dict[str, np.ndarray] = {}

    def put(self, path: str, where, values) -> None:
        """Writes values to a parameter, if the network has it."""
        if path in self.params:
            shape = self.params[path].shape
            self.params[path] = self.params[path].at[where].set(values)
            self.owned.setdefault(path, np.zeros(shape, bool))[where] = True
