# SPDX-License-Identifier: Apache-2.0
"""Immunizes a model: changes its weights so that malicious fine-tuning fails.

    python -m gift_jax.train --config configs/emoji_gift.py --workdir runs/gift

Writes into the workdir: config.json, checkpoints/, metrics.jsonl, TensorBoard events,
samples/before.png and after.png, log.txt and export/, a diffusers folder that PyTorch's
StableDiffusionPipeline.from_pretrained loads.
"""

import pathlib

from flax.traverse_util import flatten_dict, unflatten_dict

from gift_jax.data import cache
from gift_jax.defenses import base as defenses_base
from gift_jax.models import weights
from gift_jax.models.sd import stable_diffusion
from gift_jax.models.trainable import TRAINABLE_SETS
from gift_jax.runtime import cli, processes
from gift_jax.runtime.errors import at_least, choice
from gift_jax.runtime.workdir import prepare_workdir
from gift_jax.sampling.images import load_configured, read_pairs, save_image_grid
from gift_jax.state import init_state, run_key
from gift_jax.training import setup, sharding


def check(cfg):
    """Returns the method's settings, every field of the config checked.

    Raises: UserError naming the field, before data or compilation.
    """
    choice("config.method", cfg.method, tuple(defenses_base.DEFENSES))
    choice("config.trainable", cfg.trainable, tuple(TRAINABLE_SETS))
    method = defenses_base.DEFENSES[cfg.method]
    settings = method.check(cfg)
    after = cfg.post_finetune
    at_least("config.post_finetune.steps", after.steps, 0)
    optimizers = defenses_base.LEVELS + (("post_finetune",) if after.steps else ())
    setup.check(cfg, data=groups(cfg), optimizers=optimizers)
    return settings


def groups(cfg) -> tuple[str, ...]:
    """Returns the data groups that the run reads."""
    groups = defenses_base.DEFENSES[cfg.method].groups
    if cfg.post_finetune.steps and "safe" not in groups:
        groups += ("safe",)
    return groups


def run(cfg, workdir: pathlib.Path) -> pathlib.Path:
    """Immunizes cfg.model; returns the folder of the exported model."""
    settings = check(cfg)
    mesh = setup.make_run_mesh(cfg, groups(cfg))
    model = load_configured(cfg, workdir, mesh)
    data = {
        group: read_pairs(model, cfg[group], group, model.image_size, cfg.seed)
        # What is on disk first: mistakes there show before the model draws.
        for group in sorted(groups(cfg), key=lambda name: cfg[name].num_generated)
    }
    prepare_workdir(cfg, workdir, base=weights.content_hash(model.path))
    before = workdir / "samples" / "before.png"
    if cfg.samples.num and not before.exists():
        _draw(cfg, model, model.params["unet"], before)
    method = defenses_base.DEFENSES[cfg.method]
    stepping = {group: data[group] for group in data if method.plan}
    if cfg.post_finetune.steps:
        stepping["safe"] = data["safe"]
    sources = {
        group: cache.cached_source(
            model, pairs, cfg[group], run_key(cfg, f"defence/cache/{group}")
        )
        for group, pairs in stepping.items()
    }
    also_frozen = {}
    if method.edit:
        trained = method.edit(cfg, settings, model, data)
    else:
        plan = method.plan(cfg, settings, model, data, sources)
        trained = _train(cfg, workdir, mesh, model, plan, sources)
        also_frozen = plan.also_frozen
    if cfg.post_finetune.steps:
        safe = sources["safe"]
        trained = _finetune(cfg, workdir, mesh, model, safe, trained, also_frozen)
    trained = processes.to_host(trained)
    setup.export(model, trained, workdir / "export")
    if cfg.samples.num:
        flat = flatten_dict(model.params["unet"], sep="/")
        flat |= {path: a.astype(model.unet.dtype) for path, a in trained.items()}
        unet = unflatten_dict(flat, sep="/")
        _draw(cfg, model, unet, workdir / "samples" / "after.png")
    return workdir / "export"


def _train(cfg, workdir, mesh, model, plan, sources):
    """Returns the exported part of what the plan's steps make of its parameters."""
    sources = {group: (sources | plan.sources)[group] for group in plan.sizes}
    abar = stable_diffusion.noise_schedule(model)
    state = setup.run_loop(
        mesh,
        init_state(plan.params, plan.opt),
        plan.step,
        {"unet": plan.frozen, "abar": abar, **plan.also_frozen},
        setup.batches(
            sources, plan.sizes, cfg, "defence", sharding.process_slice(mesh)
        ),
        cfg,
        workdir,
        "defence",
    )
    return {path: state.params[path] for path in plan.psi}


def _finetune(cfg, workdir, mesh, model, source, trained, also_frozen):
    """Returns the parameters after cfg.post_finetune.steps on safe pairs."""
    preserve = "model" if "original" in also_frozen else "data"
    step, opt = defenses_base.plan_finetune(cfg, model, trained, preserve=preserve)
    flat = flatten_dict(model.params["unet"], sep="/")
    rest = {path: flat[path] for path in flat if path not in trained}
    cfg = cfg.copy_and_resolve_references()
    cfg.steps, cfg.name = cfg.post_finetune.steps, "post-finetune"
    state = setup.run_loop(
        mesh,
        init_state(trained, opt),
        step,
        {"unet": rest, "abar": stable_diffusion.noise_schedule(model), **also_frozen},
        setup.batches(
            {"safe": source},
            {"safe": cfg.safe.batch},
            cfg,
            "post_finetune",
            sharding.process_slice(mesh),
        ),
        cfg,
        workdir / "post_finetune",
        "post_finetune",
    )
    return state.params


def _draw(cfg, model, unet, path: pathlib.Path) -> None:
    if processes.is_main_process():
        save_image_grid(model, unet, cfg.samples.prompts, cfg.samples, path)


def main(argv: list[str] | None = None) -> int:
    cfg, workdir = cli.parse(argv, __doc__, "train")
    run(cfg, workdir)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
