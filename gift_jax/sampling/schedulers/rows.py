# SPDX-License-Identifier: Apache-2.0
"""What a scheduler is here: rows of weights, one row a call of the network.

A step of any scheduler is a fixed linear combination of the latents, of what it
remembers, of the network's output and of noise. A file of this folder writes a step
down as PyTorch does, on the names below instead of on tensors: out come its weights.

    x0 = X - sigma * M                        # M: the guided output
    yield Row(t, X + (X - x0) / sigma * dt)   # the next latents
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from gift_jax.runtime.errors import UserError

REGISTERS = 6  # the latents, and five that a step may leave to the next ones
Config = Mapping[str, Any]
_BASIS = np.eye(REGISTERS + 2)
X, MEMORY, M, NOISE = _BASIS[0], tuple(_BASIS[1:-2]), _BASIS[-2], _BASIS[-1]


class Row(NamedTuple):
    """One call of the network, and the step after it.

    t: timestep that the network is given. x: weights of the next latents. memory:
    weights of what `MEMORY` is at the next row, from the first on; the rest is 0.
    scale: of the network's input, by the latents.
    """

    t: float
    x: np.ndarray
    memory: tuple = ()
    scale: float = 1.0


class Schedule(NamedTuple):
    """The rows of one sampling, "N": float64, made once on the host.

    t, scale: "N". weights: "N R R+2": of the next registers, over the registers (the
    latents first), the guided output and noise.
    """

    t: np.ndarray
    scale: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Scheduler:
    """A scheduler of diffusers.

    name: what a user writes. class_name: in diffusers. schedule: (config, steps) ->
    `Schedule`, of a config that is complete and as diffusers' pipeline corrects it.
    only: {key: the values that are computed}. fixed: {key: value} that the name stands
    for, whatever the config says. unused: keys with no effect on what is drawn.
    """

    name: str
    class_name: str
    schedule: Callable[[Config, int], Schedule]
    only: Mapping[str, tuple] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


def schedule_of(rows: Iterable[Row], first_scale: float = 1.0) -> Schedule:
    """Returns the Schedule of rows.

    Args: first_scale: standard deviation of the first latents. The noise that sampling
      starts from is N(0, 1): this scale is a part of the first row.
    """
    t, x, memory, scale = zip(*rows, strict=True)
    weights = np.zeros((len(t), REGISTERS, REGISTERS + 2))
    weights[:, 0] = x
    for row, forms in zip(weights, memory, strict=True):
        row[1 : 1 + len(forms)] = forms if len(forms) else 0.0
    scales = np.array(scale, np.float64)
    scales[0] *= first_scale
    weights[0, :, 0] *= first_scale
    return Schedule(np.array(t, np.float64), scales, weights)


def is_stochastic(schedule: Schedule) -> bool:
    """Whether a step draws noise."""
    return bool(np.any(schedule.weights[..., -1]))


def keep(newest: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
    """Returns a memory of the newest and the `count` - 1 before it, newest first."""
    return (newest, *MEMORY[: count - 1])


def x0_and_eps(config: Config, alpha, sigma) -> tuple[np.ndarray, np.ndarray]:
    """Returns what the output says of x0 and eps, where X = alpha x0 + sigma eps."""
    if config["prediction_type"] == "v_prediction":
        return alpha * X - sigma * M, alpha * M + sigma * X
    return (X - sigma * M) / alpha, M


def denoised(config: Config, sigma) -> np.ndarray:
    """Returns what the output says of x0, where X = x0 + sigma eps."""
    if config["prediction_type"] == "v_prediction":
        return X / (sigma**2 + 1) - M * (sigma / np.hypot(sigma, 1))
    return X - sigma * M


def slope(config: Config, sigma) -> np.ndarray:
    """Returns dX / dsigma, where X = x0 + sigma eps."""
    return (X - denoised(config, sigma)) / sigma


def k_scale(sigma) -> float:
    """Returns the scale of the network's input, where X = x0 + sigma eps."""
    return 1 / np.hypot(sigma, 1)


def refuse(key: str, value: Any, rule: str) -> None:
    """Raises UserError for a value of a scheduler's key."""
    raise UserError(f"scheduler {key}={value!r} {rule}; change it, or {ANOTHER}")


ANOTHER = "draw with another scheduler"
