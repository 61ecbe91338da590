# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a model on a concept, as an attacker (or an honest user) would.

    python -m gift_jax.attack --config configs/emoji_attack.py \\
        --config.model=runs/gift/export --workdir runs/gift_attacked

By LoRA, DreamBooth or textual inversion (config.attack). Writes the same folder as
gift_jax.train; export/ is the model with the attack merged. Besides, for those who add
it to the base model in PyTorch: LoRA writes lora/pytorch_lora_weights.safetensors, for
load_lora_weights, and textual inversion learned_embeds.safetensors, for
load_textual_inversion.
"""

import pathlib
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from gift_jax.attacks import base as attacks_base
from gift_jax.data import cache
from gift_jax.models import safetensors_io, weights
from gift_jax.models.sd import stable_diffusion
from gift_jax.runtime import cli, files, processes
from gift_jax.runtime.errors import UserError, choice, one_line
from gift_jax.runtime.workdir import prepare_workdir
from gift_jax.sampling.images import load_configured, read_pairs, save_image_grid
from gift_jax.state import Step, init_state, run_key
from gift_jax.training import loop, setup, sharding


def check(cfg) -> None:
    """Raises UserError naming the field, before data or compilation."""
    choice("config.attack", cfg.attack, tuple(attacks_base.ATTACKS))
    attacks_base.ATTACKS[cfg.attack].check(cfg)
    setup.check(cfg, data=groups(cfg), optimizers=("optimizer",))
    _sample_steps(cfg)


def groups(cfg) -> tuple[str, ...]:
    """Returns the data groups that the run reads."""
    prior = cfg.attack == "dreambooth" and cfg.dreambooth.prior_weight
    return ("data", "prior") if prior else ("data",)


def _sample_steps(cfg) -> frozenset[int]:
    """Returns config.samples.at as integers; UserError for what is none."""
    steps = set()
    for value in cfg.samples.at:
        if not str(value).isdecimal():
            raise UserError(
                f"config.samples.at={one_line(value)} must be whole numbers "
                "of steps; try --config.samples.at=100,200"
            )
        steps.add(int(value))
    return frozenset(steps)


# (steps taken, the model as attacked so far) -> None
Look = Callable[[int, stable_diffusion.StableDiffusion], None]


def run(cfg, workdir: pathlib.Path) -> pathlib.Path:
    """Attacks cfg.model; returns the folder of the exported model."""
    folder = workdir / "samples"

    def look(step, model):
        path = folder / f"step_{step:06d}.png"
        if not path.exists():  # of a run that was stopped after it
            _draw(cfg, model, path)

    at = _sample_steps(cfg) if cfg.samples.num else frozenset()
    plan, params = train(cfg, workdir, at=at, look=look)
    if processes.is_main_process():
        for name, arrays in plan.files(params).items():
            _write(workdir / name, arrays)
    changed = plan.changed(params)
    setup.export(plan.model, changed, workdir / "export", plan.tokenizer)
    if cfg.samples.num:
        _draw(
            cfg, attacks_base.attacked_model(plan.model, changed), folder / "after.png"
        )
    return workdir / "export"


def train(
    cfg,
    workdir: pathlib.Path,
    *,
    shared: Callable[[attacks_base.Plan], Step] = lambda plan: plan.step,
    at: Collection[int] = (),
    look: Look = lambda step, model: None,
) -> tuple[attacks_base.Plan, Any]:
    """Takes the steps of an attack on cfg.model.

    Args: shared: plan -> the step to take: its own, or an equal one that an earlier
      run has compiled. at: after how many steps to call `look`; 0 is before the first.
    Returns: the plan and the trained parameters, NumPy arrays.
    """
    check(cfg)
    mesh = setup.make_run_mesh(cfg, groups(cfg))
    model = load_configured(cfg, workdir, mesh)
    plan = attacks_base.make_plan(cfg, model)
    data = {
        group: read_pairs(model, cfg[group], group, model.image_size, cfg.seed)
        for group in groups(cfg)
    }
    attacks_base.check_prompts(cfg, data["data"])
    prepare_workdir(cfg, workdir, base=weights.content_hash(model.path))
    batches = _batches(cfg, mesh, plan, data)

    def call(step, state):
        changed = plan.changed(processes.to_host(state.params))
        look(step, attacks_base.attacked_model(plan.model, changed))

    calls = (loop.Callback(at, call),)
    state = init_state(plan.params, plan.opt)
    state = setup.run_loop(
        mesh, state, shared(plan), plan.frozen, batches, cfg, workdir, "attack", calls
    )
    return plan, processes.to_host(state.params)


def _batches(cfg, mesh, plan: attacks_base.Plan, data) -> loop.Batches:
    """Returns the batches of the step: the group `data` is its "attack"."""
    sources, sizes = {}, {}
    for group, name in (("data", "attack"), ("prior", "prior")):
        if group in data:
            k_cache = run_key(cfg, f"attack/cache/{group}")
            sources[name] = cache.cached_source(
                plan.model, data[group], cfg[group], k_cache, ids=plan.reads_ids
            )
            sizes[name] = cfg[group].batch
    return setup.batches(sources, sizes, cfg, "attack", sharding.process_slice(mesh))


def _draw(cfg, model, path: pathlib.Path) -> None:
    unet, how = model.params["unet"], cfg.samples
    if processes.is_main_process():
        save_image_grid(model, unet, how.prompts, how, path)


def _write(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes float32 tensors as a safetensors file, aside and renamed."""
    table = {
        name: ("F32", array.shape, lambda array=array: array)
        for name, array in arrays.items()
    }
    with files.atomic_write(path) as aside:
        safetensors_io.write_file(aside, table, {"format": "pt"})


def main(argv: list[str] | None = None) -> int:
    cfg, workdir = cli.parse(argv, __doc__, "attack")
    run(cfg, workdir)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
