# SPDX-License-Identifier: Apache-2.0
"""The benchmark's matrix: its cells, and the config of every job that a cell needs."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from gift_jax import attack, train
from gift_jax.attacks import base as attacks
from gift_jax.benchmark import concepts, settings, summary
from gift_jax.data.cache import ImageSource, check_source
from gift_jax.models.load import ModelFields
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError

# fields of a job's config that change nothing of its result
_NO_RESULT = ("hardware", "checkpoints", "log_every", "verify")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell: a defended model, an attack on it, and what is then drawn.

    Attributes: concept: of `Matrix.concepts`. method: of definitions.methods, or
      `summary.ORIGINAL`. side: of `summary.SIDES`. attack: of definitions.attacks, or
      `summary.BEFORE`. prompt: what the attacker calls the concept, of
      `concepts.PROMPTS`, or `concepts.LEARNED`. seed: added to every seed of defense,
      attack and samples.
    """

    concept: str
    method: str
    side: str
    attack: str
    prompt: str
    seed: int = 0

    @property
    def is_attacked(self) -> bool:
        return self.attack != summary.BEFORE

    @property
    def is_defended(self) -> bool:
        return self.method != summary.ORIGINAL

    @property
    def id(self) -> str:
        """One word for the cell, in results.jsonl."""
        return "/".join((*self.folder.parts[1:],))

    @property
    def folder(self) -> pathlib.Path:
        parts = self.concept, self.method, self.side, self.attack
        names = [part.replace(" ", "_") for part in parts]
        return pathlib.Path("cells", *names, f"{self.prompt}_{self.seed}")

    @property
    def defense_folder(self) -> pathlib.Path:
        """Where the defended model is; the same for every attack on it."""
        names = self.concept.replace(" ", "_"), self.method, str(self.seed)
        return pathlib.Path("defenses", *names)

    def __str__(self) -> str:
        prompt = f", by {self.prompt}" if self.is_attacked else ""
        seed = f", seed {self.seed}" if self.seed else ""
        parts = self.concept, self.method, self.side, self.attack
        return ", ".join(parts) + prompt + seed


class Matrix:
    """The cells of a benchmark's config, and the jobs that make them.

    Attributes: cfg: as it was given; fields: the same, checked. attacks: {name:
      definition, a `settings.Attack`}. concepts: {name: concept}. cells: in the order
      in which they run, one concept after the other.
    Raises: UserError naming a field that breaks its rule.
    """

    def __init__(self, cfg: ConfigDict):
        self.cfg, self.fields = cfg, settings.resolve(cfg)
        self._loaded: dict[str, ConfigDict] = {}
        self._parts: dict[tuple, Any] = {}
        self._digests: dict[Cell, dict[str, str]] = {}
        self.attacks = {
            name: self._definition("attacks", name, settings.Attack)
            for name in self.fields.attacks
        }
        self._families = {
            name: self._job("attacks", name).attack for name in self.attacks
        }
        self.concepts = {
            name: self._definition("concepts", name, concepts.Concept)
            for name in self.fields.concepts
        }
        self._check_split()
        self.cells = [
            Cell(concept, method, side, name, prompt, seed)
            for concept in self.concepts
            for seed in self.fields.seeds
            for method in self.fields.methods
            for side in summary.SIDES
            for name, prompt in self._attacks(concept, side)
        ]

    def _definition(self, kind: str, name: str, cls: type) -> Any:
        field = f"config.definitions.{kind}.{name}"
        return config.resolve(self.cfg.definitions[kind][name], cls, field)

    def _check_split(self) -> None:
        """Raises UserError for a concept of the other split."""
        split = self.fields.split
        for name, concept in self.concepts.items():
            if concept.split != split:
                raise UserError(
                    f"config.concepts: {name!r} is a {concept.split} concept, and "
                    f"config.split={split!r}; what settings are chosen on is never "
                    "tested on: take it out, or run it in a suite of its own"
                )

    def _attacks(self, concept: str, side: str) -> Iterator[tuple[str, str]]:
        yield summary.BEFORE, concepts.PROMPTS[0]
        if side not in summary.ATTACKED_SIDES:
            return
        prompts = getattr(self.concepts[concept], side).prompts
        for name, definition in self.attacks.items():
            if side not in definition.sides:
                continue
            if not attacks.load(self._families[name]).names_concept:
                if prompts.learned:
                    yield name, concepts.LEARNED
                continue
            for prompt in self.fields.prompts:
                if prompt in definition.prompts and (
                    prompt == concepts.PROMPTS[0] or getattr(prompts, prompt)
                ):
                    yield name, prompt

    def attack_family(self, name: str) -> str:
        """Returns the attack of a definition, such as "lora" of "lora_x3"; or ""."""
        return self._families.get(name, "")

    def check_jobs(self) -> None:
        """Checks every concept's images and the config of every job.

        Jobs that differ in the seed alone are checked once.

        Raises: UserError naming the field, before anything is trained.
        """
        for name, concept in self.concepts.items():
            for field, images in concept.sources().items():
                check_source(images, f"config.definitions.concepts.{name}.{field}")
        defenses, attacked = {}, {}
        for cell in self.cells:
            if cell.is_defended:
                defenses[cell.concept, cell.method] = cell
            if cell.is_attacked:
                attacked[cell.concept, cell.side, cell.attack, cell.prompt] = cell
        for cell in defenses.values():
            train.resolve(self.defense_config(cell))
        for cell in attacked.values():
            attack.resolve(self.attack_config(cell))

    def defense_config(self, cell: Cell) -> ConfigDict:
        """Returns the config of `gift_jax.train` that makes the cell's model."""
        c = self._job("methods", cell.method)
        c.update(dataclasses.asdict(self.model_fields()))
        c.samples.num, c.verify = 0, "off"
        concept = self.concepts[cell.concept]
        for name, images in (("harmful", concept.defense_data), ("safe", concept.safe)):
            if name in c:
                c[name].update(dataclasses.asdict(images))
        c.seed += cell.seed
        return c.lock()

    def attack_config(self, cell: Cell, model: str = "") -> ConfigDict:
        """Returns the config of `gift_jax.attack` of the cell.

        Args: model: the folder of the attacked one; "" for the original.
        """
        c, concept = self._job("attacks", cell.attack), self.concepts[cell.concept]
        c.update(dataclasses.asdict(self.model_fields(model)))
        c.samples.num, c.verify = 0, "off"
        side = getattr(concept, cell.side)
        name = side.prompts.name or side.images.prompt
        _fill(
            c, {settings.ORIGINAL_MODEL: self.fields.model, settings.CONCEPT_NAME: name}
        )
        images = dict.fromkeys(attacks.load(c.attack).groups, concept.safe)
        images["data"] = concepts.called(self.taught(cell), self.prompt(cell))
        for group, source in images.items():
            if group in c:
                c[group].update(dataclasses.asdict(source))
        if not attacks.load(c.attack).plan:
            c.steps = 0
        c.checkpoints.every = 0
        c.seed += cell.seed
        return c.lock()

    def taught(self, cell: Cell) -> ImageSource:
        """Returns the images that a cell's attacker, or honest user, has."""
        concept = self.concepts[cell.concept]
        of_defense = self.attacks[cell.attack].images == "defense"
        if of_defense and cell.side == summary.HARMFUL:
            return concept.defense_data
        return getattr(concept, cell.side).images

    def prompt(self, cell: Cell) -> str:
        """Returns what they are called, a template or a prompt; "": their captions."""
        side = getattr(self.concepts[cell.concept], cell.side)
        text = getattr(side.prompts, cell.prompt)
        word = concepts.nonce_word(self.fields.nonce_words, cell.concept, cell.seed)
        return text.replace("{nonce}", word)

    def samples(self, cell: Cell) -> settings.BenchmarkSamples:
        """Returns how the samples of a cell's points are drawn."""
        samples = self.fields.samples
        changes: dict[str, Any] = {"seed": samples.seed + cell.seed}
        if cell.side == summary.RETAINED and samples.num_retained:
            changes["num"] = samples.num_retained
        if cell.is_attacked and self.attacks[cell.attack].guidance:
            changes["guidance"] = self.attacks[cell.attack].guidance
        return dataclasses.replace(samples, **changes)

    def eval_steps(self, cell: Cell) -> tuple[int, ...]:
        """Returns after how many steps of the cell's attack samples are judged."""
        if not cell.is_attacked:
            return (0,)
        last = self.attack_steps(cell)
        steps = self.attacks[cell.attack].eval_steps or self.fields.eval_steps
        return tuple(sorted({step for step in steps if step < last} | {last}))

    def attack_steps(self, cell: Cell) -> int:
        """Returns how many steps the cell's attack takes."""
        return self._attack_part(cell)[0]

    def digests(self, cell: Cell) -> dict[str, str]:
        """Returns what a cell depends on: {part: the first digits of its hash}."""
        if cell not in self._digests:  # asked for each time that results are read
            self._digests[cell] = self._digest_parts(cell)
        return self._digests[cell]

    def _digest_parts(self, cell: Cell) -> dict[str, str]:
        concept = self.concepts[cell.concept]
        parts = {
            "eval_steps": _digest(self.eval_steps(cell)),
            "samples": _digest(dataclasses.asdict(self.samples(cell))),
            "metrics": _digest(dataclasses.asdict(self.fields.metrics)),
            "model": _digest(dataclasses.asdict(self.model_fields())),
            "images": _digest(dataclasses.asdict(getattr(concept, cell.side))),
        }
        if cell.is_defended:
            parts["defense"] = self._defense_part(cell)
        if cell.is_attacked:
            parts["attack"] = self._attack_part(cell)[1]
        return parts

    def _defense_part(self, cell: Cell) -> str:
        key = cell.concept, cell.method, cell.seed
        if key not in self._parts:  # many cells share it
            self._parts[key] = _job_digest(self.defense_config(cell))
        return self._parts[key]

    def _attack_part(self, cell: Cell) -> tuple[int, str]:
        """Returns (its steps, the hash of its config)."""
        key = cell.concept, cell.side, cell.attack, cell.prompt, cell.seed
        if key not in self._parts:
            config = self.attack_config(cell)
            self._parts[key] = config.steps, _job_digest(config)
        return self._parts[key]

    def model_fields(self, folder: str = "") -> ModelFields:
        """Returns the original's fields, or those of a defended model's export.

        Args: folder: the export's, in which everything is merged.
        """
        names = [field.name for field in dataclasses.fields(ModelFields)]
        fields = ModelFields(**{name: getattr(self.fields, name) for name in names})
        if not folder:
            return fields
        own = {"model": folder, "revision": "", "adapters": ModelFields().adapters}
        return dataclasses.replace(fields, **own)

    def _job(self, kind: str, name: str) -> ConfigDict:
        """Returns a definition's config with the overrides, shared ones first."""
        program = {"methods": "train", "attacks": "attack"}[kind]
        role = {"methods": "defense", "attacks": "attack"}[kind]
        definition = self.cfg.definitions[kind][name]
        field = f"config.definitions.{kind}.{name}"
        c = self._load(definition.config_file, program, field)
        shared = {  # groups that this one lacks are not its business
            key: value
            for key, value in self.cfg.shared_overrides[role].items()
            if key in c
        }
        for overrides in (shared, definition.overrides):
            try:
                c.update(overrides)
            except (KeyError, TypeError) as error:
                raise UserError(f"{field}.overrides: {error.args[0]}") from error
        return c

    def _load(self, file: str, program: str, field: str) -> ConfigDict:
        if file not in self._loaded:
            try:
                self._loaded[file] = config.load_config(file, program)
            except UserError as error:
                raise UserError(f"{field}.config_file: {error}") from error
        return self._loaded[file].copy_and_resolve_references()


def _fill(c: ConfigDict, values: Mapping[str, str]) -> None:
    """Replaces the fields whose whole value is one of some names."""
    for name, value in c.items():
        if isinstance(value, ConfigDict):
            _fill(value, values)
        elif isinstance(value, str) and value in values:
            c[name] = values[value]


def _job_digest(c: ConfigDict) -> str:
    """Returns the hash of all that a job's result depends on."""
    return _digest({k: v for k, v in c.to_dict().items() if k not in _NO_RESULT})


def _digest(part: Any) -> str:
    text = json.dumps(part, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def load(cfg: ConfigDict) -> Matrix:
    """Returns the matrix of a config in which every field was checked.

    Raises: UserError naming the field, before anything is trained.
    """
    matrix = Matrix(cfg)
    matrix.check_jobs()
    return matrix
