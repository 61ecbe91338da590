# SPDX-License-Identifier: Apache-2.0
"""The optimizer of a level: its fields, and AdamW with clipping and a schedule."""

import dataclasses

import optax

from gift_jax.runtime import config

SCHEDULES = ("constant", "cosine")
MAX_DECAY = 0.999999  # of Adam's b1 and b2: at 1 nothing new counts


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The fields of one AdamW."""

    lr: float = config.number(1e-5, low=0, doc="peak of the learning rate")
    schedule: str = config.choice("constant", SCHEDULES, "of the learning rate")
    warmup_frac: float = config.number(
        0.0, low=0, high=1, doc="of this optimizer's updates: linear from 0"
    )
    b1: float = config.number(0.9, low=0, high=MAX_DECAY, doc="decay of the mean")
    b2: float = config.number(0.999, low=0, high=MAX_DECAY, doc="decay of the variance")
    weight_decay: float = config.number(1e-2, low=0, doc="decoupled, times lr")
    clip_norm: float = config.number(
        1.0, low=0, doc="global norm of the gradient; 0: no clipping"
    )


def make_optimizer(s: Optimizer, steps: int) -> optax.GradientTransformation:
    """Returns AdamW with global-norm clipping and a schedule.

    A constant rate is a part of the optimizer's state, not of the program: steps that
    differ in nothing else compile to the same one.

    Args: steps: updates of this optimizer in the whole run.
    """
    warmup = int(s.warmup_frac * steps)
    if s.schedule == "cosine":
        rate = optax.cosine_decay_schedule(s.lr, max(1, steps - warmup))
    else:
        rate = s.lr
    if warmup:
        rise = optax.linear_schedule(0.0, s.lr, warmup)
        then = rate if callable(rate) else optax.constant_schedule(rate)
        rate = optax.join_schedules([rise, then], [warmup])

    def adamw(learning_rate):
        return optax.adamw(
            learning_rate,
            s.b1,
            s.b2,
            eps_root=1e-20,  # or the unrolled gradient is NaN wherever this one is 0
            weight_decay=s.weight_decay,
        )

    tx = optax.inject_hyperparams(adamw)(learning_rate=rate)
    if not s.clip_norm:
        return tx
    return optax.chain(optax.clip_by_global_norm(s.clip_norm), tx)
