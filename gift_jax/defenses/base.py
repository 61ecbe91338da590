# SPDX-License-Identifier: Apache-2.0
"""The contract of a defense, and where to find one by its name.

A defense is one module: a frozen dataclass that declares its fields, its pure step, and
`DEFENSE`, a `Defense` that the commands ask. It may lie outside this package: its name
is then its dotted path.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from gift_jax.runtime.registry import load_object
from gift_jax.state import Step, run_key
from gift_jax.training.optimizer import make_optimizer

NAMES = ("gift", "gift_gate", "gift_adversarial", "maximize", "maximize_prior")
NAMES += ("imma", "esd", "uce")
MAX_LISTED = 16  # concepts with a line of their own in the metrics

Flat = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Defense:
    """What the commands ask of a defense.

    Attributes:
      config: the dataclass that declares its fields; the group of that name in the
        config of a run.
      title: what the model card calls it.
      plan: Task -> `Plan`, for one that takes steps.
      edit: Task -> the changed parameters, flat, for one that does not.
      check: (settings, model) -> None; UserError for a model that it cannot change,
        before any data are read.
      groups: of data that it reads.
      optimizers: names of the optimizers that its config has.
      draws_first: the plan samples from the model before the first step.
      exported: (trained parameters, paths of the trainable set) -> what is released of
        them.
      steps: the run -> in words, how many steps it takes.
      trainable: the sets of parameters that it can change; (): any.
      worst_case: in words, what the best attack reached in docs/lab, for the model
        card; "": not measured.
    """

    config: type
    title: str
    plan: Callable[["Task"], "Plan"] | None = None
    edit: Callable[["Task"], Flat] | None = None
    check: Callable[[Any, Any], None] = lambda settings, model: None
    groups: tuple[str, ...] = ("harmful", "safe")
    optimizers: tuple[str, ...] = ("lower", "upper")
    draws_first: bool = False
    exported: Callable[[Flat, tuple[str, ...]], Flat] = lambda params, paths: params
    steps: Callable[[Any], str] = lambda run: str(run.steps)
    trainable: tuple[str, ...] = ()
    worst_case: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
    """What a defense is given.

    Attributes: settings: its own dataclass. run: the run's other fields, among them
      steps, seed and trainable. model: see models/base.py. data: the pairs of each
      group. sources: their cached latents and conditioning, see data/cache.py.
    """

    settings: Any
    run: Any
    model: Any
    data: Mapping[str, Any]
    sources: Mapping[str, Any]

    def key(self, purpose: str) -> jax.Array:
        """Returns the key of one purpose of the run."""
        return run_key(self.run.seed, f"defense/{purpose}")

    def optimizer(self, name: str, updates: int = 1) -> optax.GradientTransformation:
        """Returns a named optimizer; updates: how many it makes in one step."""
        return make_optimizer(self.run.optimizers[name], self.run.steps * updates)

    def batch_size(self, group: str) -> int:
        """Returns the pairs of one update."""
        return self.run.data[group].batch

    @property
    def concepts(self) -> tuple[str, ...]:
        """Names of the harmful concepts, if they are few enough to log each."""
        names = self.data["harmful"].concept_names
        return names if len(names) <= MAX_LISTED else ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the loop runs.

    Attributes: step: of the contract in state.py. params: what trains, flat, float32.
      frozen: what else the step reads; "network": the other parameters, flat, in
      the compute dtype. opt: the optimizers' states. sizes: pairs a step of each data
      group. exported: paths of `params` that are released. sources: what takes the
      place of a group's cached pairs. then: trained parameters -> the plan of a phase
      that follows, with its `name` and number of `steps`.
    """

    step: Step
    params: Flat
    frozen: dict[str, Any]
    opt: dict[str, Any]
    sizes: dict[str, int]
    exported: tuple[str, ...] = ()
    sources: dict[str, Any] = dataclasses.field(default_factory=dict)
    then: Callable[[Flat], "Plan"] | None = None
    name: str = "immunize"
    steps: int | None = None


def load(name: str) -> Defense:
    """Returns the defense of a name, or of a dotted path to its module.

    Raises: UserError listing the names.
    """
    return load_object("config.method", name, __package__, NAMES, "DEFENSE")
