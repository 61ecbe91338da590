# SPDX-License-Identifier: Apache-2.0
"""Ascent alone: raises the loss of harmful pairs, without preserving anything."""

import dataclasses

from gift_jax.defenses import base, gift, objectives
from gift_jax.runtime import config


@dataclasses.dataclass(frozen=True)
class Maximize:
    """The fields of the ascent."""

    outer_steps: int = config.number(1, low=1, doc="updates a step")
    ascent_bound: str = config.choice(
        "raw", objectives.BOUNDS, "limit on the ascent, see objectives.bounded_ascent"
    )
    ascent_cap: float = config.number(
        20.0, low=0, doc="hinge: an example whose loss is above this has no gradient"
    )


def plan(task: base.Task) -> base.Plan:
    """Returns GIFT's plan without representation noising and without a lower level."""
    s = dataclasses.asdict(task.settings)
    settings = gift.Gift(beta=0.0, inner_steps=0, **s)
    return gift.plan(dataclasses.replace(task, settings=settings))


DEFENSE = base.Defense(
    config=Maximize, title="ascent on the harmful pairs' loss", plan=plan
)
