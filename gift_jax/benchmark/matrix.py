# SPDX-License-Identifier: Apache-2.0
"""The benchmark's matrix: its cells, and the config of every job that a cell needs."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator

from ml_collections import ConfigDict

from gift_jax import attack, train
from gift_jax.attacks import base as attacks
from gift_jax.benchmark import concepts, settings, summary
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell: a defended model, an attack on it, and what is then drawn.

    Attributes: concept: of `Matrix.concepts`. method: of definitions.methods, or
      `summary.ORIGINAL`. side: of `summary.SIDES`. attack: of definitions.attacks, or
      `summary.BEFORE`. prompt: what the attacker calls the concept, of
      `concepts.PROMPTS`: its name, a nonce word, its name in another wording, or the
      word that the attack learns. seed: added to every seed of defense, attack and
      samples.
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

    Attributes: cfg: as it was given; fields: the same, checked. concepts: {name:
      concept}: the defined ones, and `random_concepts.count` more. long_concepts: those
      random ones that are attacked for `long_attack.steps`. cells: in the order in
      which they run, one concept after the other.
    Raises: UserError naming a field that breaks its rule.
    """

    def __init__(self, cfg: ConfigDict):
        self.cfg, self.fields = cfg, settings.resolve(cfg)
        self._loaded: dict[str, ConfigDict] = {}
        self._families = {
            name: self._job("attacks", name).attack for name in self.fields.attacks
        }
        self.concepts = {
            name: config.resolve(cfg.definitions.concepts[name], concepts.Concept)
            for name in self.fields.concepts
        }
        drawn = concepts.draw_random(self.fields.random_concepts, self.concepts)
        self.long_concepts = tuple(drawn)[: self.fields.long_attack.concepts]
        self.concepts |= drawn
        self.cells = [
            Cell(concept, method, side, name, prompt, seed)
            for concept in self.concepts
            for seed in self.fields.seeds
            for method in self.fields.methods
            for side in summary.SIDES
            for name, prompt in self._attacks(side)
        ]

    def _attacks(self, side: str) -> Iterator[tuple[str, str]]:
        yield summary.BEFORE, concepts.PROMPTS[0]
        if side not in summary.ATTACKED_SIDES:
            return
        for name in self.fields.attacks:
            if not attacks.load(self._families[name]).names_concept:
                yield name, concepts.LEARNED
                continue
            for prompt in self.cfg.definitions.attacks[name].prompts:
                if prompt in self.fields.prompts:
                    yield name, prompt

    def attack_family(self, name: str) -> str:
        """Returns the attack of a definition, such as "lora" of "lora_x3"; or ""."""
        return self._families.get(name, "")

    def check_jobs(self) -> None:
        """Checks the config of every job; those that differ in the seed alone once.

        Raises: UserError naming the field, before anything is trained.
        """
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
        c.model, c.samples.num = self.fields.model, 0
        concept = self.concepts[cell.concept]
        for name, images in (("harmful", concept.defense_data), ("safe", concept.safe)):
            if name in c:
                c[name].update(names=images.names, styles=images.styles)
        c.seed += cell.seed
        return c.lock()

    def attack_config(self, cell: Cell, model: str = "") -> ConfigDict:
        """Returns the config of `gift_jax.attack` of the cell.

        Args: model: the folder of the attacked one; "" for the original.
        """
        images = self.images(cell)
        c = self._job("attacks", cell.attack)
        c.model, c.samples.num = model or self.fields.model, 0
        c.data.update(names=images.names, styles=images.styles)
        c.data.template = getattr(images.templates, cell.prompt)
        if cell.concept in self.long_concepts:
            c.steps = self.fields.long_attack.steps
        if not attacks.load(c.attack).plan:
            c.steps = 0
        c.seed += cell.seed
        return c.lock()

    def images(self, cell: Cell) -> concepts.Images:
        """Returns the images that a cell is about."""
        return getattr(self.concepts[cell.concept], cell.side)

    def eval_steps(self, cell: Cell) -> tuple[int, ...]:
        """Returns after how many steps of the cell's attack samples are judged."""
        if not cell.is_attacked:
            return (0,)
        last = self.attack_config(cell).steps
        is_long = cell.concept in self.long_concepts
        steps = (self.fields.long_attack if is_long else self.fields).eval_steps
        return tuple(sorted({step for step in steps if step < last} | {last}))

    def settings(self, cell: Cell) -> dict:
        """Returns everything that a cell depends on, as JSON has it."""
        parts = {"eval_steps": self.eval_steps(cell)}
        for name in ("samples", "metrics"):
            parts[name] = dataclasses.asdict(getattr(self.fields, name))
        parts["images"] = dataclasses.asdict(self.images(cell))
        if cell.is_defended:
            parts["defense"] = self.defense_config(cell).to_dict()
        if cell.is_attacked:
            parts["attack"] = self.attack_config(cell).to_dict()
        return json.loads(json.dumps(parts))

    def _job(self, kind: str, name: str) -> ConfigDict:
        """Returns a definition's config with the overrides, shared ones first."""
        program = {"methods": "train", "attacks": "attack"}[kind]
        role = {"methods": "defense", "attacks": "attack"}[kind]
        definition = self.cfg.definitions[kind][name]
        field = f"config.definitions.{kind}.{name}"
        c = self._load(definition.config, program, field)
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
                raise UserError(f"{field}.config: {error}") from error
        return self._loaded[file].copy_and_resolve_references()


def load(cfg: ConfigDict) -> Matrix:
    """Returns the matrix of a config in which every field was checked.

    Raises: UserError naming the field, before anything is trained.
    """
    matrix = Matrix(cfg)
    matrix.check_jobs()
    return matrix
