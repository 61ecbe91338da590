# SPDX-License-Identifier: Apache-2.0
"""Ascent with a prior: MIMA's outer loss (arXiv:2412.15320).

Raises the loss of harmful pairs and keeps that of safe ones low: GIFT without
representation noising.
"""

import dataclasses

from gift_jax.defenses import base, gift, objectives
from gift_jax.runtime import config


@dataclasses.dataclass(frozen=True)
class MaximizePrior:
    """The fields of the ascent with a prior."""

    inner_steps: int = config.number(1, low=0, doc="updates on safe pairs a step")
    outer_steps: int = config.number(1, low=1, doc="updates on harmful pairs a step")
    ascent_bound: str = config.choice(
        "raw", objectives.BOUNDS, "limit on the ascent, see objectives.bounded_ascent"
    )
    ascent_cap: float = config.number(
        20.0, low=0, doc="hinge: an example whose loss is above this has no gradient"
    )


def plan(task: base.Task) -> base.Plan:
    """Returns GIFT's plan without representation noising."""
    settings = gift.Gift(beta=0.0, **dataclasses.asdict(task.settings))
    return gift.plan(dataclasses.replace(task, settings=settings))


DEFENSE = base.Defense(
    config=MaximizePrior,
    title="ascent on the harmful pairs' loss, with a loss on safe pairs",
    plan=plan,
    worst_case="71% after DreamBooth under a made-up word",
)
