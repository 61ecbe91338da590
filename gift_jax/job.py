# SPDX-License-Identifier: Apache-2.0
"""What training and attacking share around the loop: model, data, samples, export."""

import dataclasses
import os
import pathlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from gift_jax import card, config, hosts, loop, samples, sharding
from gift_jax.config import UserError
from gift_jax.data import captions, concepts, latents, pipeline
from gift_jax.methods.denoise import Denoiser
from gift_jax.models import (
    hooks,
    hub,
    kernels,
    partition,
    stable_diffusion,
    tensors,
    weights,
)
from gift_jax.models.kernels import Kernels

EMBEDDED = pathlib.Path(__file__).parent / "assets" / "emoji-sd"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
SCHEDULES = ("constant", "cosine")
_NEEDED = {"flash": "tpu", "cudnn": "gpu"}  # by which attention
_MOST_OF_PAST = 0.999999  # Adam's b1 and b2: at 1 nothing new counts


# What the config of every job has, and of every job that trains; the least it may be.
_LEAST_OF_TRAINING = {"steps": 0, "log_every": 1, "checkpoint_every": 0, "keep": 1}
_LEAST_OF_TRAINING |= {"accumulate": 1, "nan_retries": 0}
_LEAST_OF_TRAINING |= {"processes.count": 0, "processes.index": -1}
_LEAST = {
    "cpu_devices": 0,
    "seed": 0,
    "resolution": 0,
    "samples.num": 0,
    "samples.seed": 0,
    "samples.steps": 1,
    "samples.batch": 1,
    "samples.guidance": 1,
}
_LEAST_OF_DATA = {
    "batch": 1,
    "copies": 1,
    "generate_seed": 0,
    "generate_steps": 1,
    "generate_guidance": 1,
    "shift": 0,
}
_MOST_OF_DATA = {"empty_prompts": 1, "identifier_prompts": 1}  # from 0
_MOST_OF_DATA |= {"flip": 1, "scale": 0.99}
_SMALL_BYTES = 2**30  # of a model's files
# What a data group of a config says about its pairs.
_PAIRS = tuple(
    field.name
    for field in dataclasses.fields(concepts.ConceptSpec)
    if field.name not in ("size", "held_out", "seed", "field")
)


def check(cfg: Any, *, data: Sequence[str], optimizers: Sequence[str]) -> None:
    """Checks what every job's config has, before data or compilation.

    Args: data, optimizers: names of the config's groups; a job without optimizers does
      not train.
    Raises: UserError naming the field.
    """
    for field, low in (_LEAST | (_LEAST_OF_TRAINING if optimizers else {})).items():
        value = cfg
        for name in field.split("."):
            value = value[name]
        config.at_least(f"config.{field}", value, low)
    if cfg.samples.num:
        check_not_empty("config.samples.prompts", cfg.samples.prompts)
    for group in data:
        for name, low in _LEAST_OF_DATA.items():
            config.at_least(f"config.{group}.{name}", cfg[group][name], low)
        for name, high in _MOST_OF_DATA.items():
            config.between(f"config.{group}.{name}", cfg[group][name], 0, high)
        if optimizers and cfg[group].batch % cfg.accumulate:
            fix = cfg.accumulate * max(1, cfg[group].batch // cfg.accumulate)
            raise UserError(
                f"config.{group}.batch={cfg[group].batch} must divide by "
                f"config.accumulate={cfg.accumulate}; try --config.{group}.batch={fix}"
            )
        source = concepts.check(_concept_spec(cfg[group], group))
        if cfg[group].identifier_prompts:
            _check_identifier(f"config.{group}.identifier_template", cfg[group], source)
    for group in optimizers:
        optimizer(cfg[group], 1, group)
    if optimizers:
        hosts.check(cfg.processes)
        sharding.check_shape(cfg.mesh)
        config.choice("config.on_nan", cfg.on_nan, loop.ON_NAN)
    config.choice("config.compute_dtype", cfg.compute_dtype, tuple(DTYPES))
    for field in ("attention", "remat") if optimizers else ("attention",):
        config.choice(f"config.{field}", cfg[field], kernels.CHOICES[field])


def _check_identifier(field: str, spec: Any, source: str) -> None:
    styled = captions.check_identifier(field, spec.identifier_template)
    if styled and source != "names":
        raise UserError(
            f"{field}={spec.identifier_template!r} has a style, which pictures from "
            f"{source} have not; try 'a photo of {{identifier}}'"
        )


def model_folder(name: str, revision: str = "", variant: str = "") -> pathlib.Path:
    """Returns the folder of a model: a local one, "emoji-sd", or a hub id's copy."""
    folder = local_folder(name)
    if not os.path.exists(folder) and hub.is_id(name):
        return hub.fetch(name, revision, variant)
    return folder


def local_folder(name: str) -> pathlib.Path:
    """Returns the folder of "emoji-sd", or the one that is named; it may not exist."""
    return EMBEDDED if name == "emoji-sd" else pathlib.Path(os.path.expanduser(name))


def cpu_devices_to_draw(name: str) -> int:
    """Returns into how many devices to divide the cores to draw with a model.

    Each holds the weights: a large model, which keeps all cores busy anyway, is left
    on one.
    """
    folder = local_folder(name)
    size = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
    return sharding.cores() if 0 < size < _SMALL_BYTES else 1


def load_model(
    name: str,
    dtype: str = "float32",
    *,
    revision: str = "",
    variant: str = "",
    resolution: int = 0,
) -> stable_diffusion.StableDiffusion:
    """Returns a model, its parameters and arithmetic in `dtype`.

    Args: name: a diffusers folder, "emoji-sd", or a hub id, of which `revision` is
      fetched. variant, resolution: see `stable_diffusion.load`.
    """
    config.choice("config.compute_dtype", dtype, tuple(DTYPES))
    model = stable_diffusion.load(
        model_folder(name, revision, variant),
        DTYPES[dtype],
        variant=variant,
        resolution=resolution,
    )
    logging.info("model %s, %d devices", model.path, jax.device_count())
    return model


def load_configured(cfg: Any, workdir: pathlib.Path, mesh: Mesh | None = None):
    """Returns the model that a job's config names, able to draw its samples.

    Of a hub id, config.revision becomes the commit: the run's config.json names it, and
    a run that goes on has the same one.

    Args: mesh: that it is to be trained on; None: it only draws.
    """
    if hub.is_id(cfg.model) and not local_folder(cfg.model).exists():
        asked = cfg.revision or _pinned(workdir)
        folder = hub.fetch(cfg.model, asked, cfg.variant)
        cfg.revision = hub.commit(folder) or asked
    model = load_model(
        cfg.model,
        cfg.compute_dtype,
        revision=cfg.revision,
        variant=cfg.variant,
        resolution=cfg.resolution,
    )
    samples.check(model, cfg.samples)
    return model.replace(kernels=kernels_of(cfg, mesh))


def _pinned(workdir: pathlib.Path) -> str:
    """Returns the revision in the config.json of a run that is to go on, or ""."""
    path = workdir / "config.json"
    return tensors.read_json(path).get("revision", "") if path.exists() else ""


def kernels_of(cfg: Any, mesh: Mesh | None) -> Kernels:
    """Returns how a job computes its layers; mesh: that of one that trains.

    Raises: UserError for an attention that the devices or the type do not have.
    """
    how = Kernels(cfg.attention)
    if mesh:
        how = dataclasses.replace(how, remat=cfg.remat).on(mesh)
    field, needed = f"config.attention={how.attention}", _NEEDED.get(how.attention)
    if needed and how.device != needed:
        devices = f"a {needed.upper()}, and this is a {how.device.upper()}"
        raise UserError(f"{field} needs {devices}; try auto")
    if how.attention == "cudnn" and cfg.compute_dtype == "float32":
        raise UserError(f"{field} needs config.compute_dtype=bfloat16; or try auto")
    return how


def denoiser(model: stable_diffusion.StableDiffusion) -> Denoiser:
    """Returns the model's UNet and noise schedule as the methods see them."""
    # not the model: a compiled step would keep its weights alive
    unet, kernels = model.unet, model.kernels

    def predict(unet_params, z_t, t, text, capture):
        z_t, text = z_t.astype(unet.dtype), text.astype(unet.dtype)
        return hooks.apply_unet(unet, unet_params, z_t, t, text, capture, kernels)

    steps = stable_diffusion.noise_schedule(model).shape[0]
    return Denoiser(predict, model.prediction_type, steps)


def text_encoder(model: stable_diffusion.StableDiffusion):
    """Returns (nested parameters, int32 "B L" ids) -> text states, float32 "B L D"."""

    module = model.text_encoder

    def encode(text_params, ids):
        states = hooks.apply_text(module, text_params, ids)[0]
        return states.astype(jnp.float32)

    return encode


def read_pairs(
    model, spec: Any, field: str, size: int, seed: int = 0
) -> concepts.ConceptData:
    """Returns the pictures and prompts that one group of config fields asks for.

    Args: model: draws the pictures of `generate`; the other sources do not use it.
      spec: the group, see `concepts.ConceptSpec` and `samples.generated`. field: its
      name. size: side in pixels of the pictures. seed: of random crops.
    Raises: UserError naming the field or file.
    """
    return concepts.pairs(
        _concept_spec(spec, field, size=size, seed=seed),
        draw=lambda count: samples.generated(model, spec, field, count),
    )


def _concept_spec(spec: Any, field: str, **others) -> concepts.ConceptSpec:
    values = {name: spec[name] for name in _PAIRS}
    for name in ("names", "styles"):
        values[name] = tuple(values[name])
    return concepts.ConceptSpec(**values, **others, field=f"config.{field}")


def cached_source(model, data, spec, key, *, ids=False) -> pipeline.ArraySource:
    """Returns the encoded pairs as a Grain source of {mean, std, text, concept}.

    See `row_prompts` for what the rows are called.

    Args: ids: token ids, int32 "N L", under `ids` in place of text states, for a text
      encoder that trains.
    """
    encode = stable_diffusion.tokenize if ids else stable_diffusion.encode_prompts
    cache = latents.cache_latents(
        lambda x: stable_diffusion.encode_images(model, x),
        lambda prompts: encode(model, prompts),
        data,
        copies=spec.copies,
        key=key,
        flip=spec.flip,
        shift=spec.shift,
        scale=spec.scale,
        prompts=row_prompts(data, spec, jax.random.fold_in(key, 0)),  # copies: 1, 2 ...
    )
    if ids:
        cache["ids"] = cache.pop("text")
    return pipeline.ArraySource(cache)


def row_prompts(data: concepts.ConceptData, spec: Any, key: jax.Array) -> list[str]:
    """Returns what the spec.copies of every pair are called, copy by copy.

    A share `identifier_prompts` goes by an identifier, another one each time, under
    which an attacker may hide what a picture shows. A share `empty_prompts` is left
    empty: what a model draws hangs on these too, through classifier-free guidance.
    """
    prompts, styles = data.prompts * spec.copies, data.styles * spec.copies
    if spec.identifier_prompts:
        k_rows, k_words = jax.random.split(jax.random.fold_in(key, 1))
        rows = _some_rows(k_rows, spec.identifier_prompts, len(prompts))
        rng = np.random.default_rng(np.asarray(jax.random.key_data(k_words)))
        for row in rows:
            word, style = captions.identifier(rng), styles[row]
            template = spec.identifier_template
            prompts[row] = captions.fill_identifier(template, word, style)
    for row in _some_rows(key, spec.empty_prompts, len(prompts)):
        prompts[row] = ""
    return prompts


def _some_rows(key: jax.Array, share: float, count: int) -> np.ndarray:
    if not share:
        return np.zeros(0, int)
    return np.flatnonzero(jax.random.bernoulli(key, share, (count,)))


def key(cfg: Any, purpose: str) -> jax.Array:
    """Returns the key of one purpose of a run, such as "attack/steps".

    What two purposes draw is independent, also where a defence and an attack on it have
    the same seed.
    """
    return jax.random.fold_in(jax.random.key(cfg.seed), zlib.crc32(purpose.encode()))


def batches(
    sources: Mapping[str, Any],
    sizes: Mapping[str, int],
    cfg: Any,
    role: str,
    share: tuple[int, int] = (0, 1),
):
    """Returns the named sources' shuffled batches, advanced and saved together.

    Args: role: defence, attack or post_finetune; see `key`. share: which part of every
      batch to read, of how many; see `sharding.share`.
    """
    orders = {name: key(cfg, f"{role}/order/{name}") for name in sources}
    return loop.Batches(
        {
            name: pipeline.batches(
                source,
                sizes[name],
                int(jax.random.bits(orders[name])),
                drop_remainder=False,
                process_index=share[0],
                process_count=share[1],
            )
            for name, source in sources.items()
        }
    )


def optimizer(level: Any, steps: int, field: str) -> optax.GradientTransformation:
    """Returns AdamW with global-norm clipping and a schedule.

    A constant rate is a part of the optimiser's state, not of the program: steps that
    differ in nothing else compile to the same one.

    Args: level: lr, warmup_frac, schedule, b1, b2, weight_decay, clip_norm (0: none).
      steps: updates of this level in the whole run. field: its name in errors.
    """
    config.choice(f"config.{field}.schedule", level.schedule, SCHEDULES)
    for name in ("lr", "weight_decay", "clip_norm"):
        config.at_least(f"config.{field}.{name}", level[name], 0)
    config.between(f"config.{field}.warmup_frac", level.warmup_frac, 0, 1)
    for name in ("b1", "b2"):
        config.between(f"config.{field}.{name}", level[name], 0, _MOST_OF_PAST)
    warmup = int(level.warmup_frac * steps)
    if level.schedule == "cosine":
        rate = optax.cosine_decay_schedule(level.lr, max(1, steps - warmup))
    else:
        rate = level.lr
    if warmup:
        rise = optax.linear_schedule(0.0, level.lr, warmup)
        then = rate if callable(rate) else optax.constant_schedule(rate)
        rate = optax.join_schedules([rise, then], [warmup])

    def adamw(learning_rate):
        return optax.adamw(
            learning_rate,
            level.b1,
            level.b2,
            eps_root=1e-20,  # or the unrolled gradient is NaN wherever this one is 0
            weight_decay=level.weight_decay,
        )

    tx = loop.scaled(optax.inject_hyperparams(adamw)(learning_rate=rate))
    if not level.clip_norm:
        return tx
    return optax.chain(optax.clip_by_global_norm(level.clip_norm), tx)


@dataclasses.dataclass(frozen=True)
class Split:
    """A UNet's parameters in two: float32 to train, compute dtype to keep."""

    trainable: dict[str, jax.Array]
    frozen: dict[str, jax.Array]


def float32_unet(model, paths: Iterable[str]) -> dict[str, jax.Array]:
    """Returns some of the UNet's parameters as they are on disk, flat, in float32."""
    return float32_params(model, "unet", paths)


def float32_params(model, component: str, paths: Iterable[str]):
    """Returns some of a component's parameters as they are on disk, flat, in float32.

    What trains starts from them: weights rounded to the compute dtype would end up in
    the exported model.
    """
    paths = set(paths)
    if jnp.dtype(model.unet.dtype) == jnp.float32 or model.path is None:
        flat = flatten_dict(model.params[component], sep="/")
        flat = {path: flat[path] for path in flat if path in paths}
        if model.path is None:  # an outline, which has no files
            return jax.tree.map(lambda a: a.astype(jnp.float32), flat)
        return flat
    _, params, _ = weights.load_component(
        model.path / component, component, variant=model.variant, only=paths
    )
    return jax.tree.map(jnp.asarray, flatten_dict(params, sep="/"))


def split_unet(model, rule: str) -> Split:
    """Returns the UNet's parameters divided by a rule of `partition.RULES`."""
    trainable, frozen = partition.select(model.params["unet"], rule)
    trainable = float32_unet(model, trainable)
    count = sum(a.size for a in trainable.values())
    total = count + sum(a.size for a in frozen.values())
    logging.info("training %.3f M of %.3f M parameters", count / 1e6, total / 1e6)
    return Split(trainable, frozen)


def start(cfg: Any, groups: Iterable[str]) -> Mesh:
    """Joins the other processes and returns the mesh, every batch checked against it.

    Raises: UserError naming the field of a batch or mesh that does not fit.
    """
    count = cfg.cpu_devices
    if not count and hosts.are_several(cfg.processes):
        count = 1
    elif not count:
        parts = [cfg[group].batch / cfg.accumulate for group in groups]
        count = sharding.cpu_devices_for(parts, cfg.mesh.to_dict())
    sharding.prepare(count)
    hosts.connect(cfg.processes)
    devices = jax.devices()
    if devices[0].platform == "cpu" and jax.process_count() == 1:
        devices = devices[:count]  # an earlier run of this process may have made more
    mesh = sharding.lay_out(devices, cfg.mesh.to_dict())
    for group in groups:
        sharding.check_batch(f"{group}.batch", cfg[group].batch, mesh, cfg.accumulate)
    return mesh


def layouts(cfg: Any, mesh: Mesh, state: loop.State, frozen: Any) -> tuple:
    """Returns where a run's state and its frozen arrays lie on the mesh."""
    whole = () if cfg.shard_frozen else ("fsdp",)
    return sharding.layout(mesh, state), sharding.layout(mesh, frozen, repeat=whole)


def run_loop(
    mesh: Mesh,
    state: loop.State,
    step: loop.Step,
    frozen: Any,
    data: loop.Batches,
    cfg: Any,
    workdir: pathlib.Path,
    role: str,
    calls: Sequence[loop.Call] = (),
) -> loop.State:
    """Places everything on the mesh and takes the run's steps; role: see `key`."""
    where_state, where_frozen = layouts(cfg, mesh, state, frozen)
    return loop.run(
        sharding.place(state, where_state),
        step,
        sharding.place(frozen, where_frozen),
        data,
        sharding.replicate(mesh, key(cfg, f"{role}/steps")),
        options=loop.Options(
            cfg.steps,
            cfg.log_every,
            cfg.checkpoint_every,
            cfg.keep,
            cfg.name,
            cfg.on_nan,
            cfg.nan_retries,
        ),
        workdir=workdir,
        place=lambda batch: sharding.split(mesh, batch),
        calls=calls,
    )


def export(
    model, trained: Mapping[str, jax.Array], out: pathlib.Path, tokenizer=None
) -> None:
    """Writes RUN/export, a diffusers folder with the trained tensors replaced.

    Its README.md says what was done, from the run's config.json and metrics.jsonl.

    Args: tokenizer: to be written in place of the base's.
    Raises: UserError if the base model is not what it was when the run began.
    """
    trained = hosts.fetch(dict(trained))
    if not hosts.is_first():
        return
    was = tensors.read_json(out.parent / "config.json")["base_sha256"]
    found = weights.content_hash(model.path)
    if found != was:
        raise UserError(
            f"{model.path} changed while the run went on (its content was {was[:12]}, "
            f"is {found[:12]}); put the model back and run the same command again"
        )
    readme = card.of_run(out.parent, model.path)
    weights.export(
        model.path, trained, out, model.variant, tokenizer=tokenizer, readme=readme
    )
    logging.info("exported model: %s", out)


def check_not_empty(field: str, prompts: Sequence[str]) -> None:
    """Raises UserError if a list of prompts, or names, is empty."""
    if not prompts:
        raise UserError(f"{field} is empty; give at least one")
