# SPDX-License-Identifier: Apache-2.0
"""Which of a denoiser's parameters train, by the names that configs know."""

import re
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict

from gift_jax.models.base import TrainableRules
from gift_jax.runtime.errors import UserError

# Of a UNet. Each rule is a list of (pattern, trains?); the first pattern found in a
# path decides.
TRAINABLE_SETS = {
    "cross_attention": [(r"/attn2/to_(q|k|v|out_0)/", True), (r"", False)],
    "cross_attention_kv": [(r"/attn2/to_(k|v)/", True), (r"", False)],
    "attention": [(r"/attn[12]/to_(q|k|v|out_0)/", True), (r"", False)],
    "non_cross_attention": [
        (r"/attn2/|^conv_norm_out/|^conv_out/|^time_embedding/", False),
        (r"", True),
    ],
    "all": [(r"", True)],
}


def select_trainable(
    params, rule: str, sets: Mapping[str, TrainableRules] = TRAINABLE_SETS
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits parameters into (trainable, frozen), each a flat dict "a/b/c" -> array.

    Args: params: the denoiser's, nested or flat. rule: of `sets`, a family's.
    Raises: UserError for an unknown rule, or one that selects nothing.
    """
    if rule not in sets:
        raise UserError(
            f"trainable={rule!r} must be one of {', '.join(sets)}, which are the sets "
            "of this model's parameters"
        )
    flat = flatten_dict(params, sep="/")
    trains = {path: _first_match(sets[rule], path) for path in flat}
    trainable = {path: flat[path] for path in flat if trains[path]}
    frozen = {path: flat[path] for path in flat if not trains[path]}
    if not trainable:
        raise UserError(f"trainable={rule!r} selects none of {len(flat)} parameters")
    return trainable, frozen


def _first_match(rule, path):
    return next(trains for pattern, trains in rule if re.search(pattern, path))
