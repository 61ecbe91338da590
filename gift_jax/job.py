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
from flax.traverse_util import flatten_dict
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


# What every job's config has, and the least that it may be.
_LEAST = {
    "steps": 0,
    "log_every": 1,
    "checkpoint_every": 0,
    "keep": 1,
    "cpu_devices": 1,
    "seed": 0,
    "samples.num": 0,
    "samples.seed": 0,
    "samples.steps": 1,
    "samples.batch": 1,
    "samples.guidance": 1,
}
_MAX_SEED = 2**31 - 2  # the data's order takes the next one too


def check(cfg: Any, *, data: Sequence[str], optimizers: Sequence[str]) -> None:
    """Checks what every job's config has, before data or compilation.

    Args: data, optimizers: names of the config's groups.
    Raises: UserError naming the field.
    """
    for field, low in _LEAST.items():
        value = cfg
        for name in field.split("."):
            value = value[name]
        config.at_least(f"config.{field}", value, low)
    for field, value in (("seed", cfg.seed), ("samples.seed", cfg.samples.seed)):
        if value > _MAX_SEED:
            raise UserError(f"config.{field}={value} must be at most {_MAX_SEED}")
    if cfg.samples.num:
        check_not_empty("config.samples.prompts", cfg.samples.prompts)
    for group in data:
        config.at_least(f"config.{group}.batch", cfg[group].batch, 1)
        config.at_least(f"config.{group}.copies", cfg[group].copies, 1)
        share = cfg[group].empty_prompts
        if not 0 <= share <= 1:
            raise UserError(
                f"config.{group}.empty_prompts={share} must be from 0 to 1; try 0.1"
            )
    for group in optimizers:
        optimizer(cfg[group], 1, group)
    config.choice("config.compute_dtype", cfg.compute_dtype, tuple(DTYPES))


def check_samples(model: stable_diffusion.StableDiffusion, samples: Any) -> None:
    """Raises UserError if the model's scheduler has not as many steps as asked for."""
    limit = stable_diffusion.noise_schedule(model).shape[0]
    if samples.num and samples.steps > limit:
        raise UserError(
            f"config.samples.steps={samples.steps} must be at most {limit}, the "
            "model's training timesteps"
        )


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
      size: side in pixels of the pictures.
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
    """Returns the encoded pairs as a Grain source of {mean, std, text, concept}.

    A share `spec.empty_prompts` of the rows gets the text states of "": what a model
    draws hangs on these too, through classifier-free guidance.
    """
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
    if spec.empty_prompts:
        k_empty = jax.random.fold_in(key, 0)  # the copies use 1, 2 ...
        rows = jax.random.bernoulli(k_empty, spec.empty_prompts, cache["concept"].shape)
        cache["text"][np.asarray(rows)] = stable_diffusion.encode_prompts(model, [""])
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


def float32_unet(model) -> dict[str, Any]:
    """Returns the UNet's flat parameters as they are on disk, in float32.

    What trains starts from them: weights rounded to the compute dtype would end up in
    the exported model.
    """
    params = model.params["unet"]
    if jnp.dtype(model.unet.dtype) != jnp.float32:
        _, params, _ = weights.load_component(model.path / "unet", "unet")
    return flatten_dict(params, sep="/")


def split_unet(model, rule: str) -> Split:
    """Returns the UNet's parameters divided by a rule of `partition.RULES`."""
    trainable, frozen = partition.select(model.params["unet"], rule)
    exact = float32_unet(model)
    trainable = {path: jnp.asarray(exact[path]) for path in trainable}
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
