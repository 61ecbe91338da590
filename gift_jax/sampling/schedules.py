# SPDX-License-Identifier: Apache-2.0
"""Every scheduler as one table of weights.

A step of every scheduler offered here is a fixed linear combination of the latents, of
what it remembers, of the model's output and of noise. `schedule` computes the weights
in float64 from a diffusers scheduler config, as PyTorch's pipelines draw with it;
`advance` then serves them all. A scheduler is a file of `schedulers/` and a name in the
list of its noise process below.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from gift_jax.models import flow_schedule
from gift_jax.models.sd import scheduler_config
from gift_jax.models.sd.scheduler_config import class_name
from gift_jax.runtime.errors import UserError, choice, shown
from gift_jax.sampling.schedulers import (
    ddim,
    ddpm,
    deis,
    dpmsolver_multistep,
    dpmsolver_sde,
    dpmsolver_singlestep,
    euler,
    flow,
    heun,
    kdpm2,
    lcm,
    lms,
    pndm,
    unipc,
)
from gift_jax.sampling.schedulers.rows import (
    REGISTERS,
    Schedule,
    Scheduler,
    is_stochastic,
)

__all__ = ["Schedule", "advance", "is_stochastic", "schedule", "start"]


class Process(NamedTuple):
    """The schedulers of models that were trained on one noise process.

    title: of the process, in words. schedulers: the first of them is deterministic and
    of first order, and computed of every config. complete: (config, class) -> every
    key that the class reads.
    """

    title: str
    schedulers: tuple[Scheduler, ...]
    complete: Callable[[Mapping[str, Any], str], dict[str, Any]]


_DDPM = (
    ddim.SCHEDULER,
    ddpm.SCHEDULER,
    pndm.SCHEDULER,
    euler.SCHEDULER,
    euler.ANCESTRAL,
    heun.SCHEDULER,
    lms.SCHEDULER,
    kdpm2.SCHEDULER,
    kdpm2.ANCESTRAL,
    dpmsolver_multistep.PLUS_PLUS,
    dpmsolver_multistep.SDE_PLUS_PLUS,
    dpmsolver_singlestep.SCHEDULER,
    dpmsolver_sde.SCHEDULER,
    unipc.SCHEDULER,
    deis.SCHEDULER,
    lcm.SCHEDULER,
    lcm.TCD,
)
DDPM = Process("DDPM", _DDPM, scheduler_config.complete)
FLOW = Process("flow matching", (flow.EULER, flow.HEUN), flow_schedule.complete)
SCHEDULERS = tuple(s.name for process in (DDPM, FLOW) for s in process.schedulers)
# What StableDiffusionPipeline.__init__ makes of every config that has these keys.
_CORRECTIONS = {"steps_offset": 1, "clip_sample": False}
# Keys without effect on what the pipeline draws, whatever the class.
UNUSED = (
    *_CORRECTIONS,
    "clip_sample_range",
    "dynamic_thresholding_ratio",
    "sample_max_value",
)


def schedule(config: Mapping[str, Any], scheduler: str, steps: int) -> Schedule:
    """Returns the Schedule that PyTorch's pipeline takes with a scheduler config.

    Args: config: a scheduler_config.json dict. scheduler: of `SCHEDULERS`; "": of the
      class that the config names, with its options. steps: asked for; some schedulers
      call the network more often.
    Raises: UserError for a class, a key or a value that is not computed, for the
      scheduler of another process, for a bad number of steps, or where PyTorch would
      divide by zero.
    Source: diffusers `StableDiffusionPipeline.__init__` and each file of `schedulers/`.
    """
    kind = _scheduler(config, scheduler)
    full = process_of(config).complete(config, kind.class_name)
    full |= {key: _CORRECTIONS[key] for key in full.keys() & _CORRECTIONS}
    if scheduler:
        full |= kind.fixed
    _check_values(full, kind)
    T = full["num_train_timesteps"]
    if not 1 <= steps <= T:
        raise UserError(f"steps={steps} must be from 1 to {T}, the training timesteps")
    with np.errstate(all="ignore"):
        table = kind.schedule(full, steps)
    if not all(np.all(np.isfinite(column)) for column in table):
        raise UserError(_not_finite(full, kind))
    return table


def default_scheduler(config: Mapping[str, Any]) -> str:
    """Returns the name of the config's own scheduler, or its class if none says it all.

    Raises: UserError if it is not offered.
    """
    cls, process = _scheduler(config, "").class_name, process_of(config)
    full = process.complete(config, cls)
    for kind in process.schedulers:
        if kind.class_name == cls and all(full[k] == v for k, v in kind.fixed.items()):
            return kind.name
    return cls


def process_of(config: Mapping[str, Any]) -> Process:
    """Returns the noise process that a config describes, by its class."""
    return FLOW if flow_schedule.is_flow(config) else DDPM


def first_order(config: Mapping[str, Any]) -> str:
    """Returns the name of the plain deterministic scheduler of a config's process."""
    return process_of(config).schedulers[0].name


def _scheduler(config: Mapping[str, Any], name: str) -> Scheduler:
    process = process_of(config)
    by_name = {kind.name: kind for kind in process.schedulers}
    if name:
        choice("scheduler", name, SCHEDULERS)
        if name not in by_name:
            raise UserError(
                f"scheduler={name} is not for a model of {process.title}, as this one; "
                f"choose one of {', '.join(by_name)}"
            )
        return by_name[name]
    cls = class_name(config)
    for kind in process.schedulers:
        if kind.class_name == cls:
            return kind
    raise UserError(
        f"the model's scheduler is {shown(cls)}, which is not computed here; "
        f"choose one of {', '.join(by_name)}"
    )


def _check_values(full: Mapping[str, Any], kind: Scheduler) -> None:
    """Raises UserError for a key with a value whose effect is not computed."""
    only = {"thresholding": (False,)} | kind.only
    for key, allowed in only.items():
        if key in full and full[key] not in allowed:
            choices = " or ".join(map(str, allowed))
            raise UserError(
                f"scheduler {key}={shown(full[key])}; must be {choices}, or draw with "
                "another scheduler"
            )


def _not_finite(full: Mapping[str, Any], kind: Scheduler) -> str:
    keys = [
        f"{key}={full[key]}"
        for key in ("rescale_betas_zero_snr", "prediction_type", "final_sigmas_type")
        if key in full
    ]
    return (
        f"scheduler {kind.class_name} with {', '.join(keys)} divides by zero, and "
        "draws black in PyTorch; draw with another scheduler"
    )


def start(x: Any) -> tuple:
    """Returns the registers before the first row: the latents, and zeros."""
    return (x, *[x * 0.0] * (REGISTERS - 1))


def advance(row: Schedule, registers: tuple, m: Any, noise: Any = None) -> tuple:
    """Returns the registers after a row; the first are the latents.

    Args: row: one of a `Schedule`. registers: "R" arrays "B C H W". m: "B C H W", the
      guided output for row.scale times the latents. noise: N(0, 1), "B C H W"; None
      leaves it out.
    """
    inputs = (*registers, m) if noise is None else (*registers, m, noise)
    new = []
    for weights in row.weights:  # not a matrix product: those may round on accelerators
        total = weights[0] * inputs[0]
        for k in range(1, len(inputs)):
            total = total + weights[k] * inputs[k]
        new.append(total)
    return tuple(new)
