# SPDX-License-Identifier: Apache-2.0
"""Immunizes a model: changes its weights so that malicious fine-tuning fails.

    python -m gift_jax.train --config configs/emoji_gift.py --workdir runs/gift

Writes into the workdir: config.json, checkpoints/, metrics.jsonl, TensorBoard events,
samples/before.png and after.png, log.txt and export/, a diffusers folder that PyTorch's
StableDiffusionPipeline.from_pretrained loads.
"""

import dataclasses
import pathlib

import jax

from gift_jax import config, job, loop, losses, samples, sharding
from gift_jax.methods import gift
from gift_jax.models import hooks, partition, stable_diffusion, weights

METHODS = ("gift",)


def check(cfg) -> gift.Settings:
    """Returns GIFT's settings, every field checked.

    Raises: UserError naming the field, before data or compilation.
    """
    config.choice("config.method", cfg.method, METHODS)
    config.choice("config.trainable", cfg.trainable, tuple(partition.RULES))
    g = cfg.gift
    config.choice("config.gift.gradient", g.gradient, gift.GRADIENTS)
    config.choice("config.gift.bound", g.bound, losses.BOUNDS)
    config.choice("config.gift.noise_target", g.noise_target, losses.NOISE_TARGETS)
    config.choice("config.gift.distance", g.distance, losses.DISTANCES)
    if g.beta and not g.layers:
        raise config.UserError(
            "config.gift.layers is empty; name a kind of layer, or set "
            "--config.gift.beta=0"
        )
    for layer in g.layers:
        config.choice("config.gift.layers", layer, tuple(hooks.CAPTURE_KINDS))
    for name, low in (("inner_steps", 0), ("outer_steps", 1), ("beta", 0), ("cap", 0)):
        config.at_least(f"config.gift.{name}", g[name], low)
    job.check(cfg, data=("harmful", "safe"), optimizers=("lower", "upper"))
    names = [field.name for field in dataclasses.fields(gift.Settings)]
    return gift.Settings(**{name: g[name] for name in names})


def run(cfg, workdir: pathlib.Path) -> pathlib.Path:
    """Immunizes cfg.model; returns the folder of the exported model."""
    settings = check(cfg)
    mesh = sharding.start(cfg.cpu_devices)
    for group in ("harmful", "safe"):
        sharding.check_batch(f"{group}.batch", cfg[group].batch, mesh.size)
    model = job.load_configured(cfg)
    data = {
        group: job.read_pairs(model, cfg[group], group, model.image_size, cfg.seed)
        # What is on disk first: mistakes there show before the model draws.
        for group in sorted(("harmful", "safe"), key=lambda name: cfg[name].generate)
    }
    config.prepare_workdir(cfg, workdir, base=weights.content_hash(model.path))
    k_cache = jax.random.fold_in(jax.random.key(cfg.seed), 1)
    sources = {
        group: job.cached_source(model, data[group], cfg[group], k_cache)
        for group in data
    }
    batches = job.batches(
        sources,
        {
            "harmful": cfg.harmful.batch * settings.outer_steps,
            "safe": cfg.safe.batch * max(1, settings.inner_steps),
        },
        cfg.seed,
    )
    parts = job.split_unet(model, cfg.trainable)
    frozen = {
        "unet": parts.frozen,
        "abar": stable_diffusion.noise_schedule(model),
    }
    tx = {
        level: job.optimizer(cfg[level], cfg.steps * count, level)
        for level, count in (
            ("lower", settings.inner_steps),
            ("upper", settings.outer_steps),
        )
    }
    step = gift.make_step(job.denoiser(model), settings, tx["lower"], tx["upper"])
    opt = {level: tx[level].init(parts.trainable) for level in tx}
    if cfg.samples.num and not (workdir / "samples" / "before.png").exists():
        samples.save_grid(
            model,
            model.params["unet"],
            cfg.samples.prompts,
            cfg.samples,
            workdir / "samples" / "before.png",
        )
    state = loop.init_state(parts.trainable, opt)
    state = job.run_loop(mesh, state, step, frozen, batches, cfg, workdir)
    trained = jax.device_get(state.params)
    job.export(model, trained, workdir / "export")
    if cfg.samples.num:
        merged = partition.merge(
            {path: a.astype(model.unet.dtype) for path, a in trained.items()},
            parts.frozen,
        )
        samples.save_grid(
            model,
            merged,
            cfg.samples.prompts,
            cfg.samples,
            workdir / "samples" / "after.png",
        )
    return workdir / "export"


def main(argv: list[str] | None = None) -> int:
    cfg, workdir = config.parse(argv, __doc__, "train")
    run(cfg, workdir)
    return 0


if __name__ == "__main__":
    config.run_main(main)
