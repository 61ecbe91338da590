# SPDX-License-Identifier: Apache-2.0
"""The optimizers of every level."""

from typing import Any

import optax

from gift_jax.runtime.errors import at_least, between, choice
from gift_jax.training import loop

SCHEDULES = ("constant", "cosine")
_MOST_OF_PAST = 0.999999  # Adam's b1 and b2: at 1 nothing new counts


def make_optimizer(level: Any, steps: int, field: str) -> optax.GradientTransformation:
    """Returns AdamW with global-norm clipping and a schedule.

    A constant rate is a part of the optimiser's state, not of the program: steps that
    differ in nothing else compile to the same one.

    Args: level: lr, warmup_frac, schedule, b1, b2, weight_decay, clip_norm (0: none).
      steps: updates of this level in the whole run. field: its name in errors.
    """
    choice(f"config.{field}.schedule", level.schedule, SCHEDULES)
    for name in ("lr", "weight_decay", "clip_norm"):
        at_least(f"config.{field}.{name}", level[name], 0)
    between(f"config.{field}.warmup_frac", level.warmup_frac, 0, 1)
    for name in ("b1", "b2"):
        between(f"config.{field}.{name}", level[name], 0, _MOST_OF_PAST)
    warmup = int(level.warmup_frac * steps)
    if level.schedule == "cosine":
        rate = optax.cosine_decay_schedule(level.lr, max(1, steps - warmup))
    else:
        rate = level.lr
    if warmup:
        rise = optax.linear_schedule(0.0, level.lr, warmup)
        then = rate if callable(rate) else optax.constant_schedule(rate)
        rate = optax.join_schedules([rise, then], [warmup])

    def adamw(learning_rate):
        return optax.adamw(
            learning_rate,
            level.b1,
            level.b2,
            eps_root=1e-20,  # or the unrolled gradient is NaN wherever this one is 0
            weight_decay=level.weight_decay,
        )

    tx = loop.scaled(optax.inject_hyperparams(adamw)(learning_rate=rate))
    if not level.clip_norm:
        return tx
    return optax.chain(optax.clip_by_global_norm(level.clip_norm), tx)
