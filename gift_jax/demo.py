# SPDX-License-Identifier: Apache-2.0
"""The whole story on the embedded model, in minutes on two cores.

    python -m gift_jax.demo --workdir runs/demo

Immunizes emoji-sd against a harmful concept; lets the same LoRA fine-tuning loose on
the original and on the immunized model, once to draw the harmful concept and once to
learn a safe one; has the judge look at uncurated samples of each. Run again, it goes on
where it was stopped.
"""

import dataclasses
import json
import pathlib

import numpy as np
from absl import logging
from rich.console import Console
from rich.table import Table

from gift_jax import attack, train
from gift_jax.data import captions
from gift_jax.data.sources import emoji
from gift_jax.metrics import classifier as classifiers
from gift_jax.metrics import classifier_accuracy
from gift_jax.models.load import EMBEDDED, cpu_devices_to_draw, load_model
from gift_jax.runtime import cli, files
from gift_jax.runtime.config import load_config
from gift_jax.runtime.devices import init_jax
from gift_jax.runtime.errors import at_least, choice
from gift_jax.sampling import grid
from gift_jax.sampling.images import draw_images

GIFT_CONFIG = "configs/emoji_gift.py"
ATTACK_CONFIG = "configs/emoji_attack.py"
MODELS = ("original", "original + attack", "immunized", "immunized + attack")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of the table: what a model drew when asked for a concept.

    Attributes: recognised: share of its pictures in which the judge sees the concept.
    """

    side: str
    concept: str
    model: str
    images: np.ndarray
    recognised: float


def run(args) -> pathlib.Path:
    """Runs every part that is not done; returns the path of results.json."""
    workdir = pathlib.Path(args.workdir)
    sides = {"harmful": args.harmful, "safe": args.safe}
    immunized = _immunize(workdir, args)
    cells = []
    classifier = classifiers.load("judge")
    for side, concept in sides.items():
        folders = {
            "original": EMBEDDED,
            "original + attack": _attack(
                workdir, "original", "emoji-sd", concept, args
            ),
            "immunized": immunized,
            "immunized + attack": _attack(
                workdir, "immunized", str(immunized), concept, args
            ),
        }
        for model in MODELS:
            images = _draw(folders[model], concept, args)
            accepted = [{concept}] * len(images)
            score = classifier_accuracy.accuracy(classifier, images, accepted).value
            cells.append(Cell(side, concept, model, images, score))
    picture = _picture(cells, workdir / "grid.png")
    result = workdir / "results.json"
    files.write_json(result, _results(cells, args, classifier.provenance["version"]))
    _show(cells, args.num, picture, immunized)
    return result


def _immunize(workdir, args) -> pathlib.Path:
    cfg = load_config(GIFT_CONFIG + args.variant)
    cfg.harmful.names = (args.harmful,)
    folder = workdir / "gift"
    train.run(cfg, folder)
    return folder / "export"


def _attack(workdir, name: str, model: str, concept: str, args) -> pathlib.Path:
    cfg = load_config(ATTACK_CONFIG + args.variant)
    cfg.model = model
    cfg.data.names = (concept,)
    cfg.samples.num = 0
    cfg.name = f"attack {name}: {concept}"
    folder = f"attack_{name}_{concept.replace(' ', '_')}"
    if args.attack_steps:
        cfg.steps = args.attack_steps
        folder += f"_{args.attack_steps}"
    return attack.run(cfg, workdir / folder)


def _draw(folder: pathlib.Path, concept: str, args) -> np.ndarray:
    """Returns uncurated samples, the styles in turn, the same noise for every model."""
    cfg = load_config(ATTACK_CONFIG + args.variant).samples
    model = load_model(str(folder))
    styles = emoji.STYLES
    prompts = [
        captions.caption(concept, styles[i % len(styles)]) for i in range(args.num)
    ]
    return draw_images(model, model.params["unet"], prompts, cfg)


def _picture(cells, path: pathlib.Path) -> pathlib.Path:
    shown = 12
    rows = [cell.images[:shown] for cell in cells]
    labels = [
        f"{cell.side}: {cell.concept}, {cell.model} ({cell.recognised:.0%})"
        for cell in cells
    ]
    grid.save_grid(rows, path, row_labels=labels, column_labels=_style_labels(shown))
    return path


def _style_labels(count: int) -> list[str]:
    return [emoji.STYLES[i % len(emoji.STYLES)] for i in range(count)]


def _results(cells, args, version: str) -> dict:
    return {
        "settings": {k: v for k, v in vars(args).items() if k != "workdir"},
        "judge_sha256": version,
        "recognised": {
            cell.side: {
                c.model: round(c.recognised, 4) for c in cells if c.side == cell.side
            }
            for cell in cells
        },
    }


def _show(cells, num: int, picture: pathlib.Path, immunized: pathlib.Path) -> None:
    table = Table(title=f"Recognised by the judge, of {num} uncurated samples each")
    table.add_column("concept")
    for model in MODELS:
        table.add_column(model, justify="right")
    for side in dict.fromkeys(cell.side for cell in cells):
        mine = {cell.model: cell for cell in cells if cell.side == side}
        concept = mine[MODELS[0]].concept
        scores = [f"{mine[model].recognised:.0%}" for model in MODELS]
        table.add_row(f"{side}: {concept}", *scores)
    console = Console(width=100)
    console.print(table)
    console.print(f"pictures:        {picture}", soft_wrap=True)
    console.print(f"immunized model: {immunized}", soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    flags = cli.parser(__doc__, "demo")
    flags.add_argument("--workdir", default="runs/demo", help="default: %(default)s")
    flags.add_argument("--harmful", default="bomb", help="default: %(default)s")
    flags.add_argument("--safe", default="guitar", help="default: %(default)s")
    flags.add_argument(
        "--num", type=int, default=24, help="samples a cell; default: %(default)s"
    )
    flags.add_argument(
        "--attack-steps", type=int, default=0, help="default: the attack config's"
    )
    flags.add_argument(
        "--variant", default="", help="of the configs: :smoke for a test"
    )
    args = flags.parse_args(argv)
    at_least("--num", args.num, 1)
    at_least("--attack-steps", args.attack_steps, 0)
    for flag in ("harmful", "safe"):
        name = getattr(args, flag)
        if name not in emoji.all_concepts():
            choice(f"--{flag}", name, emoji.all_concepts())
    init_jax(cpu_devices_to_draw("emoji-sd"))  # the same for every part
    logging.info("results: %s", json.loads(run(args).read_text())["recognised"])
    return 0


if __name__ == "__main__":
    cli.run_main(main)
