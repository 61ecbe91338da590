# SPDX-License-Identifier: Apache-2.0
"""Immunizes a model: changes its weights so that malicious fine-tuning fails.

    python -m gift_jax.train --config configs/emoji_gift.py --workdir runs/gift

Writes into the workdir: config.json, checkpoints/, metrics.jsonl, TensorBoard events,
samples/before.png and after.png, log.txt and export/, a diffusers folder that PyTorch's
StableDiffusionPipeline.from_pretrained loads.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from gift_jax.data import pairs
from gift_jax.data.cache import DataGroup, cached_source
from gift_jax.defenses import base
from gift_jax.models import load, model_card
from gift_jax.runtime import cli, config, processes, workdir
from gift_jax.runtime.errors import UserError
from gift_jax.sampling import verification
from gift_jax.sampling.generated import load_group
from gift_jax.sampling.images import Samples, check_samples, save_image_grid
from gift_jax.state import init_state
from gift_jax.training import setup, sharding
from gift_jax.training.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class TrainFields(setup.Run):
    """The fields that the config of every immunization has."""

    kind: str = config.choice("train", ("train",), "the command that it is for")
    method: str = config.value("gift", "a name of defenses/, or a module's dotted path")
    trainable: str = config.choice(
        "cross_attention",
        load.TRAINABLE_SETS,
        "the parameters that change, of those sets that the model has",
    )
    samples: Samples = config.group(Samples)


@dataclasses.dataclass(frozen=True)
class TrainRun(TrainFields):
    """A checked config. optimizers, data: the groups of the method, by name."""

    settings: Any = None
    optimizers: Mapping[str, Optimizer] = dataclasses.field(default_factory=dict)
    data: Mapping[str, DataGroup] = dataclasses.field(default_factory=dict)


def get_config(method: str = "gift") -> ConfigDict:
    """Returns the locked config of a method, for a config file to start from.

    It has the fields that every method has, the method's own in a group of its name,
    and a group for each of its optimizers and its data.
    """
    defense = base.load(method)
    cfg = config.to_config(TrainFields(method=method))
    if defense.trainable:
        cfg.trainable = defense.trainable[0]
    for name, fields in field_groups(defense, method).items():
        cfg[name] = config.to_config(fields)
    return cfg.lock()


def field_groups(defense: base.Defense, method: str) -> dict[str, type]:
    """Returns {group of a method's config: the dataclass that declares its fields}."""
    groups = {method.rpartition(".")[2]: defense.config}
    groups |= dict.fromkeys(defense.optimizers, Optimizer)
    return groups | dict.fromkeys(defense.groups, DataGroup)


def resolve(cfg: Any, *, with_data: bool = True) -> TrainRun:
    """Returns a config with every field checked.

    Args: with_data: False leaves out the groups of data, which may lie elsewhere now.
    Raises: UserError naming the field, before data or compilation.
    """
    defense = base.load(cfg.method)
    run = config.resolve(cfg, TrainFields)
    groups = field_groups(defense, run.method)
    values = {
        name: config.resolve_group(cfg, name, fields)
        for name, fields in groups.items()
        if with_data or fields is not DataGroup
    }
    data = {name: values[name] for name in defense.groups if with_data}
    if defense.trainable and run.trainable not in defense.trainable:
        sets = " or ".join(defense.trainable)
        raise UserError(
            f"config.trainable={run.trainable} is not for method={run.method}, which "
            f"changes other parameters too; set --config.trainable={sets}"
        )
    setup.check_batches(run, data)
    return TrainRun(
        **{f.name: getattr(run, f.name) for f in dataclasses.fields(run)},
        settings=values[next(iter(groups))],
        optimizers={name: values[name] for name in defense.optimizers},
        data=data,
    )


def run(cfg: ConfigDict, folder: pathlib.Path) -> pathlib.Path:
    """Immunizes cfg.model; returns the folder of the exported model.

    Raises: VerificationError for config.verify=on, if PyTorch does not load it alike.
    """
    settings = resolve(cfg)
    verification.check_field(settings.verify)
    _immunize(cfg, settings, folder)  # whose models are then no longer in memory
    verification.verify_run(settings, folder / "export")
    return folder / "export"


def _immunize(cfg: ConfigDict, settings: TrainRun, folder: pathlib.Path) -> None:
    """Writes all of a run's folder."""
    defense = base.load(settings.method)
    mesh = setup.make_run_mesh(settings, settings.data)
    cfg.revision = load.pin_revision(settings, folder)
    settings = dataclasses.replace(settings, revision=cfg.revision)
    model = setup.load_run_model(settings, mesh)
    model.trainable_paths(settings.trainable)  # UserError for an unknown set
    defense.check(settings.settings, model)
    check_samples(model, settings.samples)
    content = model.folder.content_hash()
    workdir.check_workdir(cfg, folder, base=content)
    task = _task(settings, defense, model)
    workdir.prepare_workdir(cfg, folder, base=content)
    before = folder / "samples" / "before.png"
    if settings.samples.num and not before.exists():
        _save_samples(model, settings, before)
    if defense.edit:
        trained = defense.edit(task)
    else:
        trained = _take_steps(task, defense.plan(task), mesh, folder)
    trained = processes.to_host(trained)
    setup.export(model, trained, folder / "export", summary(settings))
    if settings.samples.num:
        path = folder / "samples" / "after.png"
        _save_samples(model.updated(trained), settings, path)


def _task(run: TrainRun, defense: base.Defense, model) -> base.Task:
    """Reads and encodes the data that a defense asks for."""
    # What is on disk first: mistakes there show before the model draws.
    names = sorted(run.data, key=lambda name: run.data[name].num_generated)
    data = {
        name: load_group(model, run.data[name], name, model.image_size, run.seed)
        for name in names
    }
    if "safe" in data and run.data["safe"].names and run.data["harmful"].names:
        safe = pairs.without(data["safe"], data["harmful"])
        if len(safe) < len(data["safe"]):
            count = len(data["safe"]) - len(safe)
            logging.info("safe: %d pairs that are harmful ones are left out", count)
        data["safe"] = safe
    task = base.Task(run.settings, run, model, data, sources={})
    if defense.edit:
        return task
    sources = {
        name: cached_source(
            model, data[name], run.data[name], task.key(f"cache/{name}")
        )
        for name in names
    }
    return dataclasses.replace(task, sources=sources)


def _take_steps(task: base.Task, plan: base.Plan, mesh, folder: pathlib.Path):
    """Returns the exported parameters after the steps of a plan and what follows it."""
    run, role = task.run, "defense"
    while True:
        sources = {name: (task.sources | plan.sources)[name] for name in plan.sizes}
        part = sharding.process_slice(mesh)
        steps = run.steps if plan.steps is None else plan.steps
        state = setup.run_loop(
            dataclasses.replace(run, steps=steps),
            mesh,
            init_state(plan.params, plan.opt),
            plan.step,
            plan.frozen,
            setup.make_batches(sources, plan.sizes, run.seed, role, part),
            folder,
            role,
            rules=task.model.partition_rules,
            name=plan.name,
        )
        trained = {path: state.params[path] for path in plan.exported}
        if plan.then is None:
            return trained
        plan = plan.then(trained)
        folder, role = folder / plan.name, plan.name


def summary(run: TrainRun) -> model_card.RunSummary:
    """Returns what the model card says of a run."""
    defense = base.load(run.method)
    return model_card.RunSummary(
        method=defense.title,
        trained="the whole {denoiser}"
        if run.trainable == "all"
        else f"the {{denoiser}}'s {run.trainable.replace('_', '-')}",
        steps=defense.steps(run),
        worst_case=defense.worst_case,
    )


def _save_samples(model, run: TrainRun, path: pathlib.Path) -> None:
    if processes.is_main_process():
        save_image_grid(model, run.samples.prompts, run.samples, path)


def describe(cfg: ConfigDict) -> list[tuple[str, str]]:
    """Returns (field=value, its meaning) of every field of a config, for --help."""
    rows = config.describe(TrainFields, cfg)
    groups = field_groups(base.load(cfg.method), cfg.method)
    for name, fields in groups.items():
        rows += config.describe(fields, cfg[name], f"config.{name}")
    return rows


def main(argv: list[str] | None = None) -> int:
    cfg, folder = cli.parse(argv, __doc__, "train", describe)
    run(cfg, folder)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
