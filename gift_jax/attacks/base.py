# SPDX-License-Identifier: Apache-2.0
"""The contract of an attack, and where to find one by its name.

An attack is one module: a frozen dataclass that declares its fields, its pure step, and
`ATTACK`, an `Attack` that the commands ask. It may lie outside this package: its name
is then its dotted path.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from gift_jax.runtime.registry import load_object
from gift_jax.state import Step, run_key
from gift_jax.training.optimizer import make_optimizer

NAMES = (
    *("lora", "dreambooth", "textual_inversion", "retain_then_teach", "transplant"),
    *("edit_back", "interpolation"),
)

Flat = dict[str, Any]  # path -> array


@dataclasses.dataclass(frozen=True)
class Attack:
    """What the commands ask of an attack.

    Attributes:
      config: the dataclass that declares its fields; the group of that name in the
        config of a run.
      title: what the report and the model card call it.
      plan: Task -> `Plan`, for one that takes steps.
      edit: Task -> the tensors that `changed` takes for trained ones, for an attack
        that takes no steps.
      changed: (settings, `models.load.ModelFolder`, trained parameters) -> {Flax path:
        array}, the tensors of the attacked model.
      groups: of data that its config has; reads: settings -> those that a run reads.
      tokenizer: (settings, ModelFolder) -> the tokenizer of the attacked model, where
        it has new words; else None.
      check_prompts: (settings, prompts) -> None; UserError for one it cannot learn
        from.
      trained: settings -> in words, what trains; "{denoiser}" stands for what the
        model's is called.
      names_concept: the attacker chooses what to call the concept; False if the attack
        has a word of its own.
    """

    config: type
    title: str
    plan: Callable[["Task"], "Plan"] | None = None
    edit: Callable[["Task"], Flat] | None = None
    changed: Callable[[Any, Any, Any], Flat] = lambda settings, folder, params: params
    groups: tuple[str, ...] = ("data",)
    reads: Callable[[Any], tuple[str, ...]] = lambda settings: ("data",)
    tokenizer: Callable[[Any, Any], Any] = lambda settings, folder: None
    check_prompts: Callable[[Any, Sequence[str]], None] = lambda settings, prompts: None
    trained: Callable[[Any], str] = lambda settings: "its parameters"
    names_concept: bool = True


@dataclasses.dataclass(frozen=True)
class Task:
    """What an attack is given.

    Attributes: settings: its own dataclass. run: the run's other fields, among them
      steps and seed. model: see models/base.py. data: the pairs of each group, for an
      attack without steps.
    """

    settings: Any
    run: Any
    model: Any
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def key(self, purpose: str) -> jax.Array:
        """Returns the key of one purpose of the run."""
        return run_key(self.run.seed, f"attack/{purpose}")

    @property
    def tx(self) -> optax.GradientTransformation:
        """The attacker's optimizer."""
        return make_optimizer(self.run.optimizer, self.run.steps)

    @property
    def micro_batches(self) -> int:
        """Parts that each batch is computed in."""
        return self.run.hardware.grad_accum_steps


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the loop runs.

    Attributes: model: to encode prompts and draw with: the attacked one, with new words
      where it gets some. step: of the contract in state.py. params: what trains,
      float32. frozen: what else the step reads. reads_ids: batches hold token ids in
      place of conditioning, for a text encoder that trains. files: trained parameters
      -> {name in the run's folder: tensors}, for those who add the attack to the base
      model. metadata: {such a name: what its header says}.
    """

    model: Any
    step: Step
    params: dict[str, Any]
    frozen: dict[str, Any]
    reads_ids: bool = False
    files: Callable[[Any], Mapping[str, Flat]] = lambda params: {}
    metadata: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)


def load(name: str) -> Attack:
    """Returns the attack of a name, or of a dotted path to its module.

    Raises: UserError listing the names.
    """
    return load_object("config.attack", name, __package__, NAMES, "ATTACK")
