# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a model on a concept, as an attacker (or an honest user) would.

    python -m gift_jax.attack --config configs/emoji_attack.py \\
        --config.model=runs/gift/export --workdir runs/gift_attacked

By LoRA, DreamBooth, textual inversion or another of config.attack. Writes the same
folder as gift_jax.train; export/ is the model with the attack merged. Besides, for
those who add it to the base model elsewhere: LoRA writes
lora/pytorch_lora_weights.safetensors, for diffusers' load_lora_weights, and
lora/kohya.safetensors, by the names that most other programs read; textual inversion
learned_embeds.safetensors, for load_textual_inversion.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from gift_jax.attacks import base
from gift_jax.data.cache import DataGroup, cached_source
from gift_jax.models import load, model_card, safetensors_io
from gift_jax.models.sd.adapters import AdapterFiles
from gift_jax.runtime import cli, config, processes, workdir
from gift_jax.sampling import verification
from gift_jax.sampling.generated import load_group
from gift_jax.sampling.images import Samples, check_samples, save_image_grid
from gift_jax.state import Step, init_state
from gift_jax.training import loop, setup, sharding
from gift_jax.training.optimizer import Optimizer


@dataclasses.dataclass(frozen=True)
class AttackSamples(Samples):
    """The fields of the images that an attack draws."""

    seed: int = config.number(101, low=0, doc="of the noise")
    at_steps: tuple[int, ...] = config.numbers(
        (), low=0, doc="steps after which they are drawn too"
    )


@dataclasses.dataclass(frozen=True)
class AttackFields(setup.Run):
    """The fields that the config of every attack has."""

    kind: str = config.choice("attack", ("attack",), "the command that it is for")
    attack: str = config.value("lora", "a name of attacks/, or a module's dotted path")
    seed: int = config.number(100, low=0, doc="not the defender's")
    optimizer: Optimizer = config.group(Optimizer)
    samples: AttackSamples = config.group(AttackSamples)


@dataclasses.dataclass(frozen=True)
class AttackRun(AttackFields):
    """A checked config. data: the groups that it reads, by name."""

    settings: Any = None
    data: Mapping[str, DataGroup] = dataclasses.field(default_factory=dict)


def get_config(attack: str = "lora") -> ConfigDict:
    """Returns the locked config of an attack, for a config file to start from."""
    cfg = config.to_config(AttackFields(attack=attack))
    for name, fields in field_groups(base.load(attack), attack).items():
        cfg[name] = config.to_config(fields)
    return cfg.lock()


def field_groups(attack: base.Attack, name: str) -> dict[str, type]:
    """Returns {group of an attack's config: the dataclass that declares its fields}."""
    groups = {name.rpartition(".")[2]: attack.config}
    return groups | dict.fromkeys(attack.groups, DataGroup)


def resolve(cfg: Any, *, with_data: bool = True) -> AttackRun:
    """Returns a config with every field checked; groups that are not read are not.

    Args: with_data: False leaves out the groups of data, which may lie elsewhere now.
    Raises: UserError naming the field, before data or compilation.
    """
    attack = base.load(cfg.attack)
    run = config.resolve(cfg, AttackFields)
    name, fields = next(iter(field_groups(attack, run.attack).items()))
    settings = config.resolve_group(cfg, name, fields)
    data = {
        group: config.resolve_group(cfg, group, DataGroup)
        for group in attack.reads(settings)
        if with_data
    }
    setup.check_batches(run, data)
    values = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)}
    return AttackRun(**values, settings=settings, data=data)


# (steps taken, the model as attacked so far) -> None
Look = Callable[[int, Any], None]


def run(cfg: ConfigDict, folder: pathlib.Path) -> pathlib.Path:
    """Attacks cfg.model; returns the folder of the exported model.

    Raises: VerificationError for config.verify=on, if PyTorch does not load it alike.
    """
    settings = resolve(cfg)
    verification.check_field(settings.verify)
    added = _attack(cfg, settings, folder)  # its models are then no longer in memory
    settings = dataclasses.replace(settings, revision=cfg.revision)
    verification.verify_run(settings, folder / "export", added)
    return folder / "export"


def _attack(
    cfg: ConfigDict, settings: AttackRun, folder: pathlib.Path
) -> AdapterFiles | None:
    """Writes all of a run's folder; returns its files for the base model, if any."""
    attack, samples = base.load(settings.attack), settings.samples

    def look(step, model):
        path = folder / "samples" / f"step_{step:06d}.png"
        if not path.exists():  # of a run that was stopped after it
            _save_samples(model, settings, path)

    at_steps = samples.at_steps if samples.num else ()
    plan, params = train(cfg, folder, at_steps=at_steps, look=look)
    model, files = plan.model, plan.files(params)
    if processes.is_main_process():
        for name, arrays in files.items():
            notes = plan.metadata.get(name)
            safetensors_io.write_float32(folder / name, arrays, notes)
    changed = attack.changed(settings.settings, model.folder, params)
    tokenizer = attack.tokenizer(settings.settings, model.folder)
    setup.export(model, changed, folder / "export", summary(settings), tokenizer)
    if samples.num:
        path = folder / "samples" / "after.png"
        _save_samples(model.updated(changed), settings, path)
    paths = {"lora": [], "textual_inversion": []}
    for name in files:
        is_lora = name.startswith("lora/")
        paths["lora" if is_lora else "textual_inversion"].append(str(folder / name))
    added = AdapterFiles(**{field: tuple(names) for field, names in paths.items()})
    return added or None


def train(
    cfg: ConfigDict,
    folder: pathlib.Path,
    *,
    share: Callable[[base.Plan], Step] = lambda plan: plan.step,
    at_steps: Collection[int] = (),
    look: Look = lambda step, model: None,
    checkpoint_last: bool = True,
) -> tuple[base.Plan, Any]:
    """Takes the steps of an attack on cfg.model.

    Args: share: plan -> the step to take: its own, or an equal one that an earlier run
      has compiled. at_steps: after how many steps to call `look`; 0 is before the
      first. checkpoint_last: see `loop.Options`.
    Returns: the plan and the trained parameters, NumPy arrays.
    """
    run = resolve(cfg)
    attack = base.load(run.attack)
    mesh = setup.make_run_mesh(run, run.data)
    cfg.revision = load.pin_revision(run, folder)
    run = dataclasses.replace(run, revision=cfg.revision)
    model = setup.load_run_model(run, mesh)
    check_samples(model, run.samples)
    content = model.folder.content_hash()
    workdir.check_workdir(cfg, folder, base=content)
    task = base.Task(run.settings, run, model)
    plan = attack.plan(task) if attack.plan else None
    data = {
        name: load_group(model, group, name, model.image_size, run.seed)
        for name, group in run.data.items()
    }
    if "data" in data:
        attack.check_prompts(run.settings, data["data"].every_caption)
    if plan is None:
        plan = _edited(attack.edit(dataclasses.replace(task, data=data)), model)
    workdir.prepare_workdir(cfg, folder, base=content)

    def call(step, params):
        changed = attack.changed(run.settings, model.folder, params)
        look(step, plan.model.updated(changed))

    if not attack.plan:
        params = processes.to_host(plan.params)
        if at_steps:
            call(0, params)
        return plan, params
    sources = {
        name: cached_source(
            plan.model, data[name], group, task.key(f"cache/{name}"), ids=plan.reads_ids
        )
        for name, group in run.data.items()
    }
    sizes = {name: group.batch for name, group in run.data.items()}
    part = sharding.process_slice(mesh)
    state = setup.run_loop(
        run,
        mesh,
        init_state(plan.params, {"attack": task.tx.init(plan.params)}),
        share(plan),
        plan.frozen,
        setup.make_batches(sources, sizes, run.seed, "attack", part),
        folder,
        "attack",
        rules=plan.model.partition_rules,
        name=run.attack,
        checkpoint_last=checkpoint_last,
        callbacks=(
            loop.Callback(
                frozenset(at_steps),
                lambda step, state: call(step, processes.to_host(state.params)),
            ),
        ),
    )
    return plan, processes.to_host(state.params)


def _edited(params: base.Flat, model: Any) -> base.Plan:
    """Returns the plan of an attack without steps: what it made of the model."""
    return base.Plan(model, lambda *args: args, params, {})


def summary(run: AttackRun) -> model_card.RunSummary:
    """Returns what the model card says of a run."""
    attack = base.load(run.attack)
    return model_card.RunSummary(
        attack=run.attack,
        trained=attack.trained(run.settings),
        steps=str(run.steps) if attack.plan else "none",
    )


def _save_samples(model, run: AttackRun, path: pathlib.Path) -> None:
    if processes.is_main_process():
        save_image_grid(model, run.samples.prompts, run.samples, path)


def describe(cfg: ConfigDict) -> list[tuple[str, str]]:
    """Returns (field=value, its meaning) of every field of a config, for --help."""
    rows = config.describe(AttackFields, cfg)
    groups = field_groups(base.load(cfg.attack), cfg.attack)
    for name, fields in groups.items():
        rows += config.describe(fields, cfg[name], f"config.{name}")
    return rows


def main(argv: list[str] | None = None) -> int:
    cfg, folder = cli.parse(argv, __doc__, "attack", describe)
    run(cfg, folder)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
