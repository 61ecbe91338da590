# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a model on a concept, as an attacker (or an honest user) would.

    python -m gift_jax.attack --config configs/emoji_attack.py \\
        --config.model=runs/gift/export --workdir runs/gift_attacked

Writes the same folder as gift_jax.train; export/ is the model with the attack merged.
"""

import pathlib

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from gift_jax import config, job, loop, samples, sharding
from gift_jax.attacks import lora
from gift_jax.models import stable_diffusion, weights

ATTACKS = ("lora",)


def check(cfg) -> None:
    """Raises UserError naming the field, before data or compilation."""
    config.choice("config.attack", cfg.attack, ATTACKS)
    job.check(cfg, data=("data",), optimizers=("optimizer",))
    config.at_least("config.lora.rank", cfg.lora.rank, 1)
    if not cfg.lora.alpha > 0:
        raise config.UserError(
            f"config.lora.alpha={cfg.lora.alpha} must be above 0; try {cfg.lora.rank}"
        )


def run(cfg, workdir: pathlib.Path) -> pathlib.Path:
    """Attacks cfg.model; returns the folder of the exported model."""
    check(cfg)
    mesh = sharding.start(cfg.cpu_devices)
    sharding.check_batch("data.batch", cfg.data.batch, mesh.size)
    model = job.load_configured(cfg)
    data = job.read_pairs(model, cfg.data, "data", model.image_size, cfg.seed)
    key = jax.random.key(cfg.seed)
    unet = flatten_dict(model.params["unet"], sep="/")
    factors = lora.init(
        jax.random.fold_in(key, 2), unet, cfg.lora.rank, cfg.lora.targets
    )
    unet |= job.float32_unet(model, factors)
    config.prepare_workdir(cfg, workdir, base=weights.content_hash(model.path))
    source = job.cached_source(model, data, cfg.data, jax.random.fold_in(key, 1))
    batches = job.batches({"attack": source}, {"attack": cfg.data.batch}, cfg.seed)
    scale = cfg.lora.alpha / cfg.lora.rank
    tx = job.optimizer(cfg.optimizer, cfg.steps, "optimizer")
    step = lora.make_step(job.denoiser(model), tx, scale)
    frozen = {"unet": unet, "abar": stable_diffusion.noise_schedule(model)}
    state = loop.init_state(factors, {"attack": tx.init(factors)})
    state = job.run_loop(mesh, state, step, frozen, batches, cfg, workdir)
    attacked = lora.apply(unet, jax.device_get(state.params), scale)
    job.export(model, {path: attacked[path] for path in factors}, workdir / "export")
    if cfg.samples.num:
        path = workdir / "samples" / "after.png"
        nested = unflatten_dict(attacked, sep="/")
        samples.save_grid(model, nested, cfg.samples.prompts, cfg.samples, path)
    return workdir / "export"


def main(argv: list[str] | None = None) -> int:
    cfg, workdir = config.parse(argv, __doc__, "attack")
    run(cfg, workdir)
    return 0


if __name__ == "__main__":
    config.run_main(main)
