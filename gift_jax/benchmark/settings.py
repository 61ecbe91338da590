# SPDX-License-Identifier: Apache-2.0
"""The fields of a benchmark's config, each declared once.

What can be run is defined in three groups that a config file fills by name:

  definitions.methods.NAME   a config of gift_jax.train, and its changes
  definitions.attacks.NAME   a config of gift_jax.attack, its changes and its prompts
  definitions.concepts.NAME  a concept, see `concepts.Concept`

What is run is a choice of those names: methods, attacks, concepts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from gift_jax.benchmark import summary
from gift_jax.benchmark.concepts import PROMPTS, Concept
from gift_jax.metrics.settings import Settings as MetricSettings
from gift_jax.runtime import config
from gift_jax.runtime.errors import at_least, choice, not_empty
from gift_jax.sampling.schedules import SCHEDULERS


@dataclasses.dataclass(frozen=True)
class RandomConcepts:
    """Known things drawn at random, as further concepts."""

    count: int = config.number(0, low=0, doc="how many; more keep the first")
    seed: int = config.number(0, low=0, doc="of the draw")
    definition: Concept = config.group(Concept, "the group that each fills with names")


@dataclasses.dataclass(frozen=True)
class LongAttack:
    """Longer attacks on some of the random concepts."""

    concepts: int = config.number(0, low=0, doc="how many")
    steps: int = config.number(1000, low=1, doc="of their attacks")
    eval_steps: tuple[int, ...] = config.numbers(
        (75, 150, 300, 600), low=0, doc="after which samples are judged, and the last"
    )


@dataclasses.dataclass(frozen=True)
class BenchmarkSamples:
    """The samples that are drawn at each point."""

    num: int = config.number(24, low=1, doc="at each point")
    seed: int = config.number(2, low=0, doc="of the noise")
    guidance: float = config.number(3.0, low=1, doc="scale; 1: none")
    steps: int = config.number(25, low=1, doc="of the sampler")
    scheduler: str = config.choice("", ("", *SCHEDULERS), "empty: the model's own")
    batch: int = config.number(24, low=1, doc="images drawn at once")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The fields of every benchmark's config besides its definitions."""

    kind: str = config.choice("benchmark", ("benchmark",), "the command that it is for")
    name: str = config.value("benchmark", "of the suite, in the results")
    model: str = config.value("emoji-sd", "what the defenses start from")
    methods: tuple[str, ...] = config.value((), "names of definitions, or original")
    attacks: tuple[str, ...] = config.value((), "names of definitions")
    concepts: tuple[str, ...] = config.value((), "names of definitions")
    prompts: tuple[str, ...] = config.choice(
        ("name",), PROMPTS, "what attackers call the concept"
    )
    seeds: tuple[int, ...] = config.numbers(
        (0,), low=0, doc="added to the seeds of defense, attack and samples"
    )
    eval_steps: tuple[int, ...] = config.numbers(
        (), low=0, doc="of an attack, after which samples are judged, and the last"
    )
    random_concepts: RandomConcepts = config.group(RandomConcepts)
    long_attack: LongAttack = config.group(LongAttack)
    samples: BenchmarkSamples = config.group(BenchmarkSamples)
    metrics: MetricSettings = config.group(MetricSettings)
    gap_metrics: tuple[str, ...] = config.value(
        (), "similarities of which gap ratios are computed"
    )


def get_config() -> ConfigDict:
    """Returns a benchmark's config with nothing defined, for a config file to fill."""
    c = config.to_config(Benchmark)
    c.definitions = ConfigDict({"methods": {}, "attacks": {}, "concepts": {}})
    # fields of every job's config, set before a definition's own overrides
    c.shared_overrides = ConfigDict({"defense": {}, "attack": {}})
    return c


def resolve(cfg: Any) -> Benchmark:
    """Returns a config with every field checked; the jobs' configs are not.

    Raises: UserError naming the field.
    """
    fields = config.resolve(cfg, Benchmark)
    definitions = cfg.definitions
    for name in ("methods", "attacks", "prompts", "seeds"):
        not_empty(f"config.{name}", getattr(fields, name))
    for name in fields.methods:
        choice("config.methods", name, (summary.ORIGINAL, *definitions.methods))
    for name in fields.attacks:
        choice("config.attacks", name, tuple(definitions.attacks))
        field = f"config.definitions.attacks.{name}.prompts"
        not_empty(field, definitions.attacks[name].prompts)
        for prompt in definitions.attacks[name].prompts:
            choice(field, prompt, PROMPTS)
    for name in fields.concepts:
        choice("config.concepts", name, tuple(definitions.concepts))
        field = f"config.definitions.concepts.{name}"
        config.resolve(definitions.concepts[name], Concept, field).check_names(field)
    if not fields.concepts:
        field = "config.random_concepts.count"
        at_least(field, fields.random_concepts.count, 1)
    return fields


def method(file: str, overrides: Mapping | None = None) -> ConfigDict:
    """Returns the definition of a method.

    Args: file: a config of gift_jax.train, FILE or FILE:variant.
    """
    return ConfigDict({"config": file, "overrides": overrides or {}})


def attack(
    file: str, overrides: Mapping | None = None, prompts: tuple[str, ...] = ("name",)
) -> ConfigDict:
    """Returns the definition of an attack.

    Args: file: a config of gift_jax.attack, FILE or FILE:variant. prompts: those that
      it is run with, as far as config.prompts has them; an attack that learns a word
      of its own is always run with that.
    """
    definition = ConfigDict({"config": file, "overrides": overrides or {}})
    definition.prompts = prompts
    return definition


def attack_rates(name: str, file: str, lr: float) -> dict[str, ConfigDict]:
    """Returns an attack at a learning rate, and by name at 3 and 10 times that."""
    rates = {name: attack(file, {"optimizer": {"lr": lr}}, PROMPTS)}
    for factor in (3, 10):
        overrides = {"optimizer": {"lr": factor * lr}}
        rates[f"{name}_x{factor}"] = attack(file, overrides)
    return rates
