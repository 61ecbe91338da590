# SPDX-License-Identifier: Apache-2.0
"""What every run that trains sets up: mesh, batches, the loop, the export."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from gift_jax.data import captions, pipeline
from gift_jax.data.pairs import check_pairs, pairs_spec
from gift_jax.models import kernels, model_card, safetensors_io, weights
from gift_jax.models.load import DTYPES
from gift_jax.runtime import processes
from gift_jax.runtime.devices import cpu_devices_for, init_jax
from gift_jax.runtime.errors import UserError, at_least, between, choice, not_empty
from gift_jax.state import State, Step, run_key
from gift_jax.training import loop, sharding
from gift_jax.training.optimizer import make_optimizer

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
    "augmented_copies": 1,
    "generation.seed": 0,
    "generation.steps": 1,
    "generation.guidance": 1,
    "shift": 0,
}
_MOST_OF_DATA = {"prompt_dropout": 1, "nonce_prompts": 1}  # from 0
_MOST_OF_DATA |= {"flip": 1, "scale": 0.99}


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
        at_least(f"config.{field}", value, low)
    if cfg.samples.num:
        not_empty("config.samples.prompts", cfg.samples.prompts)
    for group in data:
        for name, low in _LEAST_OF_DATA.items():
            value = cfg[group]
            for part in name.split("."):
                value = value[part]
            at_least(f"config.{group}.{name}", value, low)
        for name, high in _MOST_OF_DATA.items():
            between(f"config.{group}.{name}", cfg[group][name], 0, high)
        if optimizers and cfg[group].batch % cfg.accumulate:
            fix = cfg.accumulate * max(1, cfg[group].batch // cfg.accumulate)
            raise UserError(
                f"config.{group}.batch={cfg[group].batch} must divide by "
                f"config.accumulate={cfg.accumulate}; try --config.{group}.batch={fix}"
            )
        source = check_pairs(pairs_spec(cfg[group], group))
        if cfg[group].nonce_prompts:
            _check_nonce(f"config.{group}.nonce_template", cfg[group], source)
    for group in optimizers:
        make_optimizer(cfg[group], 1, group)
    if optimizers:
        processes.check(cfg.processes)
        sharding.check_mesh(cfg.mesh)
        choice("config.on_nan", cfg.on_nan, loop.ON_NAN)
    choice("config.compute_dtype", cfg.compute_dtype, tuple(DTYPES))
    for field in ("attention", "remat") if optimizers else ("attention",):
        choice(f"config.{field}", cfg[field], kernels.CHOICES[field])


def _check_nonce(field: str, spec: Any, source: str) -> None:
    styled = captions.check_nonce_template(field, spec.nonce_template)
    if styled and source != "names":
        raise UserError(
            f"{field}={spec.nonce_template!r} has a style, which pictures from "
            f"{source} have not; try 'a photo of {{nonce}}'"
        )


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
    orders = {name: run_key(cfg, f"{role}/order/{name}") for name in sources}
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


def make_run_mesh(cfg: Any, groups: Iterable[str]) -> Mesh:
    """Joins the other processes and returns the mesh, every batch checked against it.

    Raises: UserError naming the field of a batch or mesh that does not fit.
    """
    count = cfg.cpu_devices
    if not count and processes.are_several(cfg.processes):
        count = 1
    elif not count:
        parts = [cfg[group].batch / cfg.accumulate for group in groups]
        count = cpu_devices_for(parts, cfg.mesh.to_dict())
    init_jax(count)
    processes.connect(cfg.processes)
    devices = jax.devices()
    if devices[0].platform == "cpu" and jax.process_count() == 1:
        devices = devices[:count]  # an earlier run of this process may have made more
    mesh = sharding.make_mesh(devices, cfg.mesh.to_dict())
    for group in groups:
        sharding.check_batch(f"{group}.batch", cfg[group].batch, mesh, cfg.accumulate)
    return mesh


def run_shardings(cfg: Any, mesh: Mesh, state: State, frozen: Any) -> tuple:
    """Returns where a run's state and its frozen arrays lie on the mesh."""
    whole = () if cfg.shard_frozen else ("fsdp",)
    return sharding.shardings(mesh, state), sharding.shardings(
        mesh, frozen, repeat=whole
    )


def run_loop(
    mesh: Mesh,
    state: State,
    step: Step,
    frozen: Any,
    data: loop.Batches,
    cfg: Any,
    workdir: pathlib.Path,
    role: str,
    calls: Sequence[loop.Callback] = (),
) -> State:
    """Places everything on the mesh and takes the run's steps; role: see `key`."""
    where_state, where_frozen = run_shardings(cfg, mesh, state, frozen)
    return loop.run(
        sharding.put(state, where_state),
        step,
        sharding.put(frozen, where_frozen),
        data,
        sharding.replicate(mesh, run_key(cfg, f"{role}/steps")),
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
        place=lambda batch: sharding.put_batch(mesh, batch),
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
    trained = processes.to_host(dict(trained))
    if not processes.is_main_process():
        return
    was = safetensors_io.read_json(out.parent / "config.json")["base_sha256"]
    found = weights.content_hash(model.path)
    if found != was:
        raise UserError(
            f"{model.path} changed while the run went on (its content was {was[:12]}, "
            f"is {found[:12]}); put the model back and run the same command again"
        )
    readme = model_card.of_run(out.parent, model.path)
    weights.export(
        model.path, trained, out, model.variant, tokenizer=tokenizer, readme=readme
    )
    logging.info("exported model: %s", out)
