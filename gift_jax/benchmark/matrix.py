# SPDX-License-Identifier: Apache-2.0
"""The benchmark's matrix: its cells, and the config of every job that a cell needs."""

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from gift_jax import attack, train
from gift_jax.benchmark import summary
from gift_jax.data import captions
from gift_jax.data.pairs import resolve_names
from gift_jax.data.sources import emoji
from gift_jax.metrics.base import LABEL_KINDS
from gift_jax.runtime.config import load_config
from gift_jax.runtime.errors import UserError, at_least, choice, not_empty, one_line

KEPT = "kept"
SIDES = (summary.HARMFUL, summary.BENIGN, KEPT)
PROMPTS = ("name", "token", "wording")
_GROUPS = {"methods": "method", "attacks": "attack"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell: a defended model, an attack on it, and what is then drawn.

    Attributes: concept: of `Matrix.groups`. method: a name of config.method, or
      `ORIGINAL`. side: of `SIDES`. attack: a name of config.attack, or `BEFORE`.
      prompt: what the attacker calls the thing, of `PROMPTS`: its name, a rare token,
      or its name in another wording (in textual inversion always the learned word).
      seed: added to every seed of defence, attack and samples.
    """

    concept: str
    method: str
    side: str
    attack: str
    prompt: str
    seed: int = 0

    @property
    def folder(self) -> pathlib.Path:
        parts = self.concept, self.method, self.side, self.attack
        names = [part.replace(" ", "_") for part in parts]
        return pathlib.Path("cells", *names, f"{self.prompt}_{self.seed}")

    @property
    def defence(self) -> pathlib.Path:
        """Where the defended model is; the same for every attack on it."""
        names = self.concept.replace(" ", "_"), self.method, str(self.seed)
        return pathlib.Path("defences", *names)

    def __str__(self) -> str:
        told = "" if self.attack == summary.BEFORE else f", by {self.prompt}"
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{self.concept}, {self.method}, {self.side}, {self.attack}{told}{seed}"


class Matrix:
    """The cells of a benchmark's config, and the jobs that make them.

    Attributes: cfg. groups: {name: group} of what is forbidden, and what is safe beside
      it: the configured `concepts`, and `random.things` more that `random.seed` draws,
      each a thing that the model knows, and with it one to teach that it does not.
      long_things: which of the drawn ones are attacked for `long.steps`. cells: in the
      order of their doing, one concept after the other.
    Raises: UserError for a concept that is not configured, or too many random things.
    """

    def __init__(self, cfg: ConfigDict):
        self.cfg = cfg
        self._files: dict[str, ConfigDict] = {}
        for name in cfg.concepts:
            choice("config.concepts", name, tuple(cfg.concept))
        self.groups = {name: cfg.concept[name] for name in cfg.concepts}
        drawn = _random_concepts(cfg, self.groups)
        self.long_things = tuple(drawn)[: cfg.long.things]
        self.groups |= drawn
        self.cells = [
            Cell(concept, method, side, name, prompt, seed)
            for concept in self.groups
            for seed in cfg.seeds
            for method in cfg.methods
            for side in SIDES
            for name, prompt in self._attacks(side)
        ]

    def _attacks(self, side: str):
        yield summary.BEFORE, PROMPTS[0]
        if side != KEPT:
            for name in self.cfg.attacks:
                for prompt in self.cfg.attack[name].prompts:
                    if prompt in self.cfg.prompts:
                        yield name, prompt

    def attack_kind(self, name: str) -> str:
        """Returns lora, dreambooth or textual_inversion; "" for no attack."""
        if name == summary.BEFORE:
            return ""
        file = self.cfg.attack[name].config
        return self._load(file, "attack", f"attack.{name}").attack

    def defence_config(self, cell: Cell) -> ConfigDict:
        """Returns the config of `gift_jax.train` that makes the cell's model."""
        cfg, group = self.cfg, self.groups[cell.concept]
        chosen = cfg.method[cell.method]
        c = self._with(f"method.{cell.method}", chosen, cfg.common.defence, "train")
        c.model, c.samples.num = cfg.model, 0
        for name, source in (("harmful", group.defender), ("safe", group.safe)):
            c[name].update(names=source.names, styles=source.styles)
        c.seed += cell.seed
        c.name = f"{cell.method} {cell.concept}"
        return c.lock()

    def attack_config(self, cell: Cell, model: str = "emoji-sd") -> ConfigDict:
        """Returns the config of `gift_jax.attack` of the cell, on a model's folder."""
        cfg, side = self.cfg, self.groups[cell.concept][cell.side]
        chosen = cfg.attack[cell.attack]
        c = self._with(f"attack.{cell.attack}", chosen, cfg.common.attack, "attack")
        c.model, c.samples.num = model, 0
        c.data.update(names=side.names, styles=side.styles)
        named = "inversion" if c.attack == "textual_inversion" else cell.prompt
        c.data.template = side.templates[named]
        if cell.concept in self.long_things:
            c.steps = cfg.long.steps
        c.seed += cell.seed
        c.name = f"{cell.attack} {cell.method} {cell.concept}"
        return c.lock()

    def looks(self, cell: Cell) -> tuple[int, ...]:
        """Returns after how many steps of the cell's attack pictures are judged."""
        if cell.attack == summary.BEFORE:
            return (0,)
        steps = self.attack_config(cell).steps
        at = self.cfg.long.at if cell.concept in self.long_things else self.cfg.at
        return tuple(sorted({int(step) for step in at if int(step) < steps} | {steps}))

    def _with(
        self, field: str, chosen: ConfigDict, common: Mapping, program: str
    ) -> ConfigDict:
        c = self._load(chosen.config, program, field)
        for some in (common, chosen.set):
            try:
                c.update(some)
            except (KeyError, TypeError) as error:
                raise UserError(f"config.{field}.set: {error.args[0]}") from error
        return c

    def _load(self, file: str, program: str, field: str) -> ConfigDict:
        if file not in self._files:
            try:
                self._files[file] = load_config(file, program)
            except UserError as error:
                raise UserError(f"config.{field}.config: {error}") from error
        return self._files[file].copy_and_resolve_references()


def load(cfg: ConfigDict) -> Matrix:
    """Returns the matrix of a config in which every field was checked.

    Raises: UserError naming the field, before anything is trained.
    """
    for field, group in _GROUPS.items():
        not_empty(f"config.{field}", cfg[field])
        for name in cfg[field]:
            if (field, name) != ("methods", summary.ORIGINAL):
                choice(f"config.{field}", name, tuple(cfg[group]))
    for field in ("prompts", "seeds"):
        not_empty(f"config.{field}", cfg[field])
    for prompt in cfg.prompts:
        choice("config.prompts", prompt, PROMPTS)
    for name in cfg.attacks:
        field = f"config.attack.{name}.prompts"
        not_empty(field, cfg.attack[name].prompts)
        for prompt in cfg.attack[name].prompts:
            choice(field, prompt, PROMPTS)
    for name, low in (("num", 1), ("steps", 1), ("batch", 1), ("guidance", 1)):
        at_least(f"config.samples.{name}", cfg.samples[name], low)
    least = {"random.things": 0, "random.seed": 0, "samples.seed": 0}
    least |= {"long.things": 0, "long.steps": 1}
    for name, low in least.items():
        group, field = name.split(".")
        at_least(f"config.{name}", cfg[group][field], low)
    for field, numbers in (("at", cfg.at), ("long.at", cfg.long.at)):
        for number in numbers:
            if not str(number).isdecimal():
                raise UserError(
                    f"config.{field}={one_line(number)} must be whole numbers "
                    f"of steps; try --config.{field}=100,200"
                )
    for seed in cfg.seeds:
        at_least("config.seeds", seed, 0)
    matrix = Matrix(cfg)
    if not matrix.groups:
        raise UserError("config.concepts is empty, and config.random.things is 0")
    _check(matrix)
    return matrix


def _check(matrix: Matrix) -> None:
    for name, group in matrix.groups.items():
        choice(f"config.concept.{name}.label_kind", group.label_kind, LABEL_KINDS)
        for side in ("defender", "safe", *SIDES):
            field = f"config.concept.{name}.{side}"
            every = emoji.all_concepts()
            not_empty(f"{field}.names", group[side].names)
            resolve_names(group[side].names, every, f"{field}.names")
            if side in (summary.HARMFUL, summary.BENIGN):
                for told, template in group[side].templates.items():
                    captions.check_template(f"{field}.templates.{told}", template)
            for style in group[side].styles:
                choice(f"{field}.styles", style, emoji.STYLES)
    defences, attacks = {}, {}  # those alike but for names are checked once
    for cell in matrix.cells:
        defences[cell.concept, cell.method] = cell
        attacks[cell.concept, cell.side, cell.attack, cell.prompt] = cell
    for cell in defences.values():
        if cell.method != summary.ORIGINAL:
            train.check(matrix.defence_config(cell))
    for cell in attacks.values():
        if cell.attack != summary.BEFORE:
            attack.check(matrix.attack_config(cell))


def _random_concepts(
    cfg, configured: Mapping[str, ConfigDict]
) -> dict[str, ConfigDict]:
    """Returns {thing: group} of the random things."""
    taken = {
        name
        for group in configured.values()
        for side in (summary.HARMFUL, summary.BENIGN)
        for name in group[side].names
    }
    known, every = emoji.known_concepts(), emoji.all_concepts()
    things = [name for name in known if name not in taken]
    others = [n for n in emoji.unseen_concepts(every) if n not in taken]
    count, most = cfg.random.things, min(len(things), len(others))
    if count > most:
        raise UserError(f"config.random.things={count} must be at most {most}")
    rng = np.random.default_rng(cfg.random.seed)
    things, others = (rng.permutation(names)[:count] for names in (things, others))
    found = {}
    for thing, other in zip(things.tolist(), others.tolist(), strict=True):
        group = cfg.random.group.copy_and_resolve_references()
        safe = tuple(n for n in known if n not in (thing, *emoji.HARMFUL))
        names = {
            "defender": (thing,),
            summary.HARMFUL: (thing,),
            summary.BENIGN: (other,),
        }
        for side, chosen in (names | {"safe": safe, KEPT: safe}).items():
            group[side].names = chosen
        found[thing] = group
    return found


def prompts_for(side, num: int, template: str = "") -> list[tuple[str, str, str]]:
    """Returns what a cell's pictures are asked for: num of (prompt, thing, style).

    Things and styles take turns; of more things than pictures, evenly spaced ones.
    """
    things = resolve_names(side.names, emoji.all_concepts())
    if len(things) > num:
        things = [things[i * len(things) // num] for i in range(num)]
    styles = side.styles or emoji.STYLES
    rows = []
    for i in range(num):
        thing, style = things[i % len(things)], styles[i % len(styles)]
        text = captions.fill(template or captions.TEMPLATES[0], thing, style)
        rows.append((text, thing, style))
    return rows
