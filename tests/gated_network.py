# SPDX-License-Identifier: Apache-2.0
"""What a network with a gate in it computes: its detector's logits, and its output."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from flax.traverse_util import unflatten_dict


class Programs(NamedTuple):
    """Jitted (flat parameters, inputs) -> logits "B"; output "B C h w"."""

    logits: Callable
    output: Callable


def compile_network(module, path, to_logits, apply):
    """Returns the programs of a network.

    Args: module: of Flax. path: of the layer of which `to_logits` makes the logits.
      apply: (module, nested parameters, *inputs) -> (output, hidden states).
    """

    def logits(network, inputs):
        _, state = module.apply(
            {"params": unflatten_dict(network, sep="/")},
            *inputs,
            capture_intermediates=lambda layer, _: "/".join(layer.path) == path,
            mutable=["intermediates"],
        )
        (wide,) = jax.tree.leaves(state["intermediates"])
        return to_logits(wide)

    def output(network, inputs):
        return apply(module, unflatten_dict(network, sep="/"), *inputs)[0]

    return Programs(jax.jit(logits), jax.jit(output))
