# SPDX-License-Identifier: Apache-2.0
"""What the gates of all networks have in common."""

import jax
import jax.numpy as jnp
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


def largest(logits_BN: jax.Array) -> jax.Array:
    """Returns the largest of each row, "B".

    Not by max: its gradient is 0 / 0 where XLA computes the values again, rounded.
    """
    index_B1 = jnp.argmax(logits_BN, axis=1)[:, None]
    return jnp.take_along_axis(logits_BN, index_B1, axis=1)[:, 0]
