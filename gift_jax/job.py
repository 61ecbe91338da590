# SPDX-License-Identifier: Apache-2.0
"""What training and attacking share around the loop: model, data, samples, export."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from gift_jax import config, loop, sampling, sharding
from gift_jax.config import UserError
from gift_jax.data import concepts, latents, pipeline
from gift_jax.methods.denoise import Denoiser
from gift_jax.models import hooks, partition, stable_diffusion, weights
from gift_jax.report import grid

EMBEDDED = pathlib.Path(__file__).parent / "assets" / "emoji-sd"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
SCHEDULES = ("constant", "cosine")


def model_folder(name: str) -> pathlib.Path:
    """Returns the folder of a model: "emoji-sd" is the embedded one."""
    return EMBEDDED if name == "emoji-sd" else pathlib.Path(name)


def load_model(name: str, dtype: str = "float32") -> stable_diffusion.StableDiffusion:
    """Returns the model of a folder, its parameters and arithmetic in `dtype`."""
    config.choice("config.compute_dtype", dtype, tuple(DTYPES))
    model = stable_diffusion.load(model_folder(name), DTYPES[dtype])
    logging.info("model %s, %d devices", model.path, jax.device_count())
    return model


def denoiser(model: stable_diffusion.StableDiffusion) -> Denoiser:
    """Returns the model's UNet and noise schedule as the methods see them."""

    def predict(unet_params, z_t, t, text, capture):
        z_t, text = z_t.astype(model.unet.dtype), text.astype(model.unet.dtype)
        return hooks.apply_unet(model.unet, unet_params, z_t, t, text, capture)

    steps = stable_diffusion.noise_schedule(model).shape[0]
    return Denoiser(predict, model.prediction_type, steps)


def read_pairs(spec: Any, field: str, size: int) -> concepts.ConceptData:
    """Returns the pictures and prompts that one group of config fields asks for.

    Args: spec: names, styles, template, folder, prompt. field: the group's name.
      size: side in pixels of a folder's pictures.
    """
    return concepts.pairs(
        concepts.ConceptSpec(
            names=tuple(spec.names),
            styles=tuple(spec.styles),
            template=spec.template,
            folder=spec.folder,
            prompt=spec.prompt,
            size=size,
            field=f"config.{field}",
        )
    )


def cached_source(model, data, spec, key) -> pipeline.ArraySource:
    """Returns the encoded pairs as a Grain source of {mean, std, text, concept}."""
    cache = latents.cache_latents(
        lambda x: stable_diffusion.encode_images(model, x),
        lambda prompts: stable_diffusion.encode_prompts(model, prompts),
        data,
        copies=spec.copies,
        key=key,
        flip=spec.flip,
        shift=spec.shift,
        scale=spec.scale,
    )
    return pipeline.ArraySource(cache)


def batches(sources: Mapping[str, Any], sizes: Mapping[str, int], seed: int):
    """Returns the named sources' shuffled batches, advanced and saved together."""
    return loop.Batches(
        {
            name: pipeline.batches(
                source,
                sizes[name],
                seed + i,
                drop_remainder=False,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
            for i, (name, source) in enumerate(sorted(sources.items()))
        }
    )


def optimizer(level: Any, steps: int, field: str) -> optax.GradientTransformation:
    """Returns AdamW with global-norm clipping and a schedule.

    Args: level: lr, warmup_frac, schedule, b1, b2, weight_decay, clip_norm (0: none).
      steps: updates of this level in the whole run. field: its name in errors.
    """
    config.choice(f"config.{field}.schedule", level.schedule, SCHEDULES)
    for name in ("lr", "warmup_frac", "weight_decay", "clip_norm"):
        config.at_least(f"config.{field}.{name}", level[name], 0)
    warmup = int(level.warmup_frac * steps)
    if level.schedule == "cosine":
        rate = optax.cosine_decay_schedule(level.lr, max(1, steps - warmup))
    else:
        rate = optax.constant_schedule(level.lr)
    if warmup:
        rise = optax.linear_schedule(0.0, level.lr, warmup)
        rate = optax.join_schedules([rise, rate], [warmup])
    adamw = optax.adamw(
        rate,
        level.b1,
        level.b2,
        eps_root=1e-20,  # or the unrolled gradient is NaN wherever this one is 0
        weight_decay=level.weight_decay,
    )
    if not level.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(level.clip_norm), adamw)


@dataclasses.dataclass(frozen=True)
class Split:
    """A UNet's parameters in two: float32 to train, compute dtype to keep."""

    trainable: dict[str, jax.Array]
    frozen: dict[str, jax.Array]


def split_unet(model, rule: str) -> Split:
    """Returns the UNet's parameters divided by a rule of `partition.RULES`."""
    trainable, frozen = partition.select(model.params["unet"], rule)
    trainable = {path: a.astype(jnp.float32) for path, a in trainable.items()}
    count = sum(a.size for a in trainable.values())
    total = count + sum(a.size for a in frozen.values())
    logging.info("training %.3f M of %.3f M parameters", count / 1e6, total / 1e6)
    return Split(trainable, frozen)


def run_loop(mesh: Mesh, state, step, frozen, data, cfg, workdir) -> loop.State:
    """Places everything on the mesh and takes the run's steps."""
    return loop.run(
        sharding.replicate(mesh, state),
        step,
        sharding.replicate(mesh, frozen),
        data,
        sharding.replicate(mesh, jax.random.key(cfg.seed)),
        options=loop.Options(
            cfg.steps, cfg.log_every, cfg.checkpoint_every, cfg.keep, cfg.name
        ),
        workdir=workdir,
        place=lambda batch: sharding.split(mesh, batch),
    )


def draw(model, unet_params, prompts: Sequence[str], cfg) -> np.ndarray:
    """Returns one picture a prompt, uint8 "N H W 3"; picture i draws its own noise.

    Args: cfg: seed, guidance, steps, batch (pictures a call; the last one is padded, so
      that one compilation serves all).
    """
    sampler = sampling.make_sampler(model, None, cfg.steps, cfg.guidance)
    text = stable_diffusion.encode_prompts(model, list(dict.fromkeys(prompts)))
    row = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    cond = np.asarray(text)[[row[prompt] for prompt in prompts]]
    empty = stable_diffusion.encode_prompts(model, [""])
    key, size = jax.random.key(cfg.seed), min(cfg.batch, len(prompts))
    images = []
    for first in range(0, len(prompts), size):
        some = np.minimum(np.arange(first, first + size), len(prompts) - 1)
        noise = sampling.initial_latents(key, size, model.latent_shape, first)
        out = sampler(unet_params, model.params["vae"], cond[some], empty, noise)
        images.append(np.asarray(out)[: len(prompts) - first])
    return np.concatenate(images)


def sample_grid(model, unet_params, prompts, cfg, path: pathlib.Path) -> None:
    """Writes a PNG with cfg.num pictures a prompt, a row each."""
    every = [prompt for prompt in prompts for _ in range(cfg.num)]
    images = draw(model, unet_params, every, cfg)
    rows = images.reshape(len(prompts), cfg.num, *images.shape[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save_grid(list(rows), path, row_labels=list(prompts))
    logging.info("samples: %s", path)


def export(model, trained: Mapping[str, jax.Array], out: pathlib.Path) -> None:
    """Writes RUN/export, a diffusers folder with the trained tensors replaced."""
    weights.export(model.path, jax.device_get(dict(trained)), out)
    logging.info("exported model: %s", out)


def check_not_empty(field: str, prompts: Sequence[str]) -> None:
    """Raises UserError if a list of prompts is empty."""
    if not prompts:
        raise UserError(f"{field} is empty; give at least one prompt")
