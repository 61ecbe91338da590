# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes on safe pictures first, then teaches the concept: two phases in one run.

A defense that leaves the model at a bad start for harmful data may be undone by
ordinary training on data that nobody forbids. Every parameter of the network trains, as
in DreamBooth; its optimizer goes on from the first phase to the second.
Source: the "retain, then relearn" attacks on tamper-resistant models of Tamirisa et al.
2024, arXiv:2408.00761, section 5.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gift_jax.attacks import base, dreambooth
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError
from gift_jax.state import Step


@dataclasses.dataclass(frozen=True)
class RetainThenTeach:
    """The fields of the attack."""

    retain_steps: int = config.number(
        100, low=1, doc="of the run's steps, the first, on the group `retain` alone"
    )


def make_step(teach: Step, retain_steps: int) -> Step:
    """Returns a step on batch["retain"] while step < retain_steps, then on "data".

    Args: teach: a step that reads {"data": pairs}. The two groups' batches must be of
      one shape.
    """

    def step(state, frozen, batch, key):
        is_first = state.step < retain_steps
        retain, data = batch["retain"], batch["data"]
        pairs = jax.tree.map(lambda a, b: jnp.where(is_first, a, b), retain, data)
        return teach(state, frozen, {"data": pairs}, key)

    return step


def plan(task: base.Task) -> base.Plan:
    """Returns DreamBooth's plan with the two phases.

    Raises: UserError if the groups' batches differ in size, or the first phase takes
      all steps.
    """
    run, retain_steps = task.run, task.settings.retain_steps
    sizes = {name: run.data[name].batch for name in ("retain", "data")}
    if sizes["retain"] != sizes["data"]:
        raise UserError(
            f"config.retain.batch={sizes['retain']} must be config.data.batch; try "
            f"--config.retain.batch={sizes['data']}"
        )
    if run.steps and retain_steps >= run.steps:
        raise UserError(
            f"config.retain_then_teach.retain_steps={retain_steps} must be less than "
            f"config.steps={run.steps}, or nothing is taught"
        )
    whole = dreambooth.plan(dataclasses.replace(task, settings=dreambooth.DreamBooth()))
    return dataclasses.replace(whole, step=make_step(whole.step, retain_steps))


ATTACK = base.Attack(
    config=RetainThenTeach,
    title="safe fine-tuning, then DreamBooth (arXiv:2408.00761)",
    plan=plan,
    changed=lambda s, folder, params: dict(params),
    groups=("data", "retain"),
    reads=lambda s: ("data", "retain"),
    trained=lambda s: (
        f"the whole {{denoiser}}, {s.retain_steps} steps on safe pictures first"
    ),
)
