# SPDX-License-Identifier: Apache-2.0
"""The fields of a benchmark's config, each declared once.

What can be run is defined in three groups that a config file fills by name:

  definitions.methods.NAME   a config of gift_jax.train, and its changes
  definitions.attacks.NAME   a config of gift_jax.attack, its changes, and how it is run
  definitions.concepts.NAME  a concept, see `concepts.Concept`

What is run is a choice of those names: methods, attacks, concepts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from gift_jax.benchmark import summary
from gift_jax.benchmark.concepts import PROMPTS, SPLITS, check_nonce_words
from gift_jax.data import captions
from gift_jax.metrics.settings import Settings as MetricSettings
from gift_jax.models.load import ModelFields
from gift_jax.runtime import config
from gift_jax.runtime.errors import choice, not_empty
from gift_jax.sampling.schedules import SCHEDULERS

# Values of a definition's overrides that each cell fills in.
ORIGINAL_MODEL, CONCEPT_NAME = "<original model>", "<prompt that names the concept>"


@dataclasses.dataclass(frozen=True)
class BenchmarkSamples:
    """The samples that are drawn at each point."""

    num: int = config.number(24, low=1, doc="at each point")
    num_retained: int = config.number(
        0, low=0, doc="of retained things, for fidelity; 0: as many"
    )
    seed: int = config.number(2, low=0, doc="of the noise")
    guidance: float = config.number(3.0, low=1, doc="scale; 1: none")
    steps: int = config.number(25, low=1, doc="of the sampler")
    scheduler: str = config.choice("", ("", *SCHEDULERS), "empty: the model's own")
    batch: int = config.number(24, low=1, doc="images drawn at once")


@dataclasses.dataclass(frozen=True)
class Method:
    """A definition of a defense."""

    config_file: str = config.value("", "FILE or FILE:variant of gift_jax.train")


@dataclasses.dataclass(frozen=True)
class Attack:
    """A definition of an attack.

    `overrides`, a group of its own, holds changes of its config.
    """

    config_file: str = config.value("", "FILE or FILE:variant of gift_jax.attack")
    prompts: tuple[str, ...] = config.choice(
        ("name",),
        PROMPTS,
        "that it is run with, as far as config.prompts and the concept have them",
    )
    images: str = config.choice(
        "attacker", ("attacker", "defense"), "whose harmful images the attacker has"
    )
    sides: tuple[str, ...] = config.choice(
        summary.ATTACKED_SIDES, summary.ATTACKED_SIDES, "that it is run on"
    )
    guidance: float = config.number(0.0, low=0, doc="of its samples; 0: as all")
    eval_steps: tuple[int, ...] = config.numbers(
        (), low=0, doc="after which samples are judged; empty: as all"
    )
    is_bound: bool = config.value(
        False, "shown, but no worst case: no defense of weights can stop it"
    )

    def check(self, field: str) -> None:
        not_empty(f"{field}.prompts", self.prompts)
        not_empty(f"{field}.sides", self.sides)


@dataclasses.dataclass(frozen=True)
class Benchmark(ModelFields):
    """The fields of every benchmark's config besides its definitions."""

    kind: str = config.choice("benchmark", ("benchmark",), "the command that it is for")
    name: str = config.value("benchmark", "of the suite, in the results")
    split: str = config.choice("test", SPLITS, "of the concepts; settings are tuned")
    methods: tuple[str, ...] = config.value((), "names of definitions, or original")
    attacks: tuple[str, ...] = config.value((), "names of definitions")
    concepts: tuple[str, ...] = config.value((), "names of definitions")
    prompts: tuple[str, ...] = config.choice(
        ("name",), PROMPTS, "what attackers call the concept"
    )
    nonce_words: tuple[str, ...] = config.value(
        captions.HELD_OUT_WORDS, "made-up words of attackers; a seed has one of them"
    )
    seeds: tuple[int, ...] = config.numbers(
        (0,), low=0, doc="added to the seeds of defense, attack and samples"
    )
    eval_steps: tuple[int, ...] = config.numbers(
        (), low=0, doc="of an attack, after which samples are judged, and the last"
    )
    samples: BenchmarkSamples = config.group(BenchmarkSamples)
    metrics: MetricSettings = config.group(MetricSettings)
    gap_metrics: tuple[str, ...] = config.value(
        (), "similarities of which gap ratios are computed; the first is the headline"
    )


def get_config() -> ConfigDict:
    """Returns a benchmark's config with nothing defined, for a config file to fill."""
    c = config.to_config(Benchmark)
    c.definitions = ConfigDict({"methods": {}, "attacks": {}, "concepts": {}})
    # fields of every job's config, set before a definition's own overrides
    c.shared_overrides = ConfigDict({"defense": {}, "attack": {}})
    return c


def resolve(cfg: Any) -> Benchmark:
    """Returns a config with every field checked; definitions and jobs are not.

    Raises: UserError naming the field.
    """
    fields = config.resolve(cfg, Benchmark)
    check_nonce_words(fields.nonce_words, "config.nonce_words")
    for name in ("methods", "attacks", "concepts", "prompts", "seeds"):
        not_empty(f"config.{name}", getattr(fields, name))
        choices = (summary.ORIGINAL,) if name == "methods" else ()
        if name in cfg.definitions:
            for value in getattr(fields, name):
                choice(f"config.{name}", value, (*choices, *cfg.definitions[name]))
    return fields


def method(file: str, overrides: Mapping | None = None) -> ConfigDict:
    """Returns the definition of a method.

    Args: file: a config of gift_jax.train, FILE or FILE:variant.
    """
    definition = config.to_config(Method(file))
    definition.overrides = ConfigDict(overrides or {})
    return definition


def attack(
    file: str,
    overrides: Mapping | None = None,
    prompts: tuple[str, ...] = ("name",),
    **fields: Any,
) -> ConfigDict:
    """Returns the definition of an attack.

    Args: file: a config of gift_jax.attack, FILE or FILE:variant. overrides: may hold
      `ORIGINAL_MODEL` and `CONCEPT_NAME`. fields: others of `Attack`.
    """
    definition = config.to_config(Attack(file, prompts, **fields))
    definition.overrides = ConfigDict(overrides or {})
    return definition


def every_attack(
    file: str, lrs: Mapping[str, float], changes: Mapping[str, Mapping] | None = None
) -> dict[str, ConfigDict]:
    """Returns {name: definition} of every attack.

    Those that vary another are run on the harmful side alone, most under a nonce word
    alone: the worst case is the attacker's, and an honest user takes the plain ones.

    Args: file: a config of gift_jax.attack with a variant for each attack; without one
      it is LoRA. lrs: learning rates of "dreambooth" and "lora". changes: {name:
      further overrides}.
    """
    dreambooth, transplant = f"{file}:dreambooth", f"{file}:transplant"
    schedule = {"schedule": "cosine", "warmup_frac": 0.1}
    dropout = {"data": {"prompt_dropout": 0.1}}
    original = {"original": ORIGINAL_MODEL}
    both = ("name", "nonce")
    harmful: dict[str, Any] = {"sides": ("harmful",)}
    variation = harmful | {"prompts": ("nonce",)}
    attacks = {}
    for name, kind_file in (("dreambooth", dreambooth), ("lora", file)):
        lr = lrs[name]
        attacks[name] = attack(kind_file, {"optimizer": {"lr": lr}}, PROMPTS)
        for label, factor in (("third", 1 / 3), ("x3", 3), ("x10", 10)):
            attacks[f"{name}_{label}"] = attack(
                kind_file,
                {"optimizer": {"lr": factor * lr}},
                **variation | {"prompts": both},
            )
        attacks[f"{name}_cosine"] = attack(
            kind_file, {"optimizer": {"lr": 3 * lr} | schedule}, **variation
        )
    attacks |= {
        "dreambooth_dropout": attack(dreambooth, dropout, **variation),
        "dreambooth_dropout_g1": attack(dreambooth, dropout, **variation, guidance=1.0),
        "dreambooth_no_outliers": attack(
            dreambooth, {"dreambooth": {"outlier_limit": 30.0}}, **variation
        ),
        "dreambooth_same_images": attack(dreambooth, {}, **variation, images="defense"),
        "textual_inversion": attack(f"{file}:textual_inversion"),
        "embedding_search": attack(f"{file}:embedding_search", **harmful),
        "word_search": attack(f"{file}:word_search", **harmful),
        "retain_then_teach": attack(f"{file}:retain_then_teach", {}, **variation),
        "transplant_lora": attack(transplant, {"transplant": original}, both),
        "transplant_full": attack(
            transplant,
            {
                "transplant": original | {"update": "full"},
                "optimizer": {"lr": lrs["dreambooth"]},
            },
            **variation,
        ),
        "edit_back": attack(
            f"{file}:edit_back",
            {"edit_back": {"source": CONCEPT_NAME}},
            ("nonce", "existing_word"),
            **harmful,
        ),
        "interpolation": attack(
            f"{file}:interpolation",
            {"interpolation": {"sibling": ORIGINAL_MODEL}},
            **harmful,
            is_bound=True,
        ),
    }
    for name, overrides in (changes or {}).items():
        attacks[name].overrides.update(ConfigDict(overrides))
    return attacks
