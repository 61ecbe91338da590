# SPDX-License-Identifier: Apache-2.0
"""Compiles a step of `gift_jax.train`'s config for TPUs that are not here.

The TPU compiler runs on any machine (libtpu): its accounts of memory, of floating-point
operations and of bytes are the real ones, and so are the collectives in its programs.
"""

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gift_jax import train
from gift_jax.compile.fit import DoesNotFit
from gift_jax.compile.hlo import Chip, account
from gift_jax.defenses import base
from gift_jax.diffusion import squared_error
from gift_jax.models import load
from gift_jax.runtime.errors import UserError
from gift_jax.runtime.versions import versions
from gift_jax.state import init_state, merge_params
from gift_jax.training import loop, setup, sharding

STEPS = ("train", "unet")
CHIPS = {  # Google Cloud's pages "TPU v4", "v5e", "v5p" and "v6e (Trillium)"
    "v4": Chip(32 * 2**30, 275e12, 1228e9),
    "v5e": Chip(16 * 2**30, 197e12, 819e9),
    "v5p": Chip(95 * 2**30, 459e12, 2765e9),
    "v6e": Chip(32 * 2**30, 918e12, 1640e9),
}
NO_DATA = {  # a source that needs no files: a step does not depend on what is in it
    "names": (),
    "folder": "",
    "tfds": "",
    "caption_key": "",
    "label_key": "",
    "num_generated": 1,
    "prompt": "anything",
    "nonce_prompts": 0.0,
}
_TOO_LARGE = re.compile(r"(?:Used |HLO temporaries \()([\d.]+)([GM])")


def chip_of(topology: str) -> str:
    """Returns the chip of "v5e:4x4"; UserError for one that is not known."""
    chip, _, shape = topology.partition(":")
    if chip not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(
            f"--topology={topology} must be a chip of {', '.join(CHIPS)} and its "
            "shape; try v5e:4x4 or v5p:2x2x2"
        )
    return chip


def devices_of(topology: str) -> list:
    """Returns the devices of a topology, for which programs can be compiled.

    Raises: UserError if the compiler does not know it.
    """
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except jax.errors.JaxRuntimeError as error:
        message = str(error).splitlines()[0]
        raise UserError(
            f"--topology={topology}: {message}; try v5e:2x2 or v5p:2x2x2"
        ) from error


def abstract_model(run):
    """Returns the model that a config names, without its weights.

    Args: run: has model, revision, compute_dtype and resolution.
    """
    return load.abstract_model(
        run.model,
        run.compute_dtype,
        revision=run.revision,
        resolution=run.resolution,
    )


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """What a plan asks of pairs: the names of their concepts."""

    concept_names: tuple[str, ...] = ("harmful",)


def train_step(run: train.TrainRun, mesh, phase: int = 1):
    """Returns (the compiled-to-be step of a config's defense, what goes in).

    Args: phase: of a defense that trains in several.
    Returns: what goes in is (state, frozen, batch, key) as `loop.run` has them, all
      ShapeDtypeStructs with their sharding.
    Raises: UserError for a defense that takes no steps, or has to draw first, or has
      fewer phases.
    """
    defense = base.load(run.method)
    if defense.plan is None or defense.draws_first:
        why = "takes no steps" if defense.plan is None else "draws before its steps"
        raise UserError(f"config.method={run.method} {why}; try another method")
    model = abstract_model(run).with_kernels(load.kernels_of(run, mesh))
    data = dict.fromkeys(defense.groups, _Pairs())
    plans = []

    def build(params):
        whole = model.replace(params=params)
        plan = defense.plan(base.Task(run.settings, run, whole, data, {}))
        for number in range(1, phase):
            if plan.then is None:
                raise UserError(
                    f"--phase={phase}: config.method={run.method} has {number}; leave "
                    "it out for the first"
                )
            plan = plan.then(plan.params)
        plans.append(plan)
        return init_state(plan.params, plan.opt), plan.frozen

    state, frozen = jax.eval_shape(build, model.params)
    (plan,) = plans
    batch = {name: batch_shapes(model, count) for name, count in plan.sizes.items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    where = (
        *setup.run_shardings(run, mesh, model.partition_rules, state, frozen),
        sharding.batch_sharding(mesh),
        sharding.replicated(mesh),
    )
    shapes = tuple(map(_placed, (state, frozen, batch, key), where))
    return loop.compile_step(plan.step, shapes), shapes


def unet_step(run: train.TrainRun, mesh, batch_size: int):
    """Returns the same for one forward and backward pass of the trainable set alone.

    What goes in is (trainable parameters, frozen parameters, batch).
    """
    model = abstract_model(run).with_kernels(load.kernels_of(run, mesh))
    denoiser = model.denoiser

    def loss(trainable, frozen, batch):
        params = merge_params(trainable, frozen)
        args = batch["z_t"], batch["t"], batch["cond"], ()
        prediction, _ = denoiser.predict(params, *args)
        return jnp.mean(squared_error(prediction, batch["eps"]))

    def split(params):
        parts = model.replace(params=params).split(run.trainable)
        return parts.trainable, parts.frozen

    trainable, frozen = jax.eval_shape(split, model.params)
    pairs = batch_shapes(model, batch_size)
    key = jax.random.key(0)
    t = jax.eval_shape(lambda: model.noise.sample_t(key, batch_size))
    batch = {"z_t": pairs["mean"], "eps": pairs["mean"], "t": t}
    batch["cond"] = pairs["cond"]
    whole = sharding.replicated(mesh)
    shapes = (
        _placed(trainable, whole),
        _placed(frozen, whole),
        _placed(batch, sharding.batch_sharding(mesh)),
    )
    return jax.jit(jax.grad(loss), out_shardings=whole), shapes


def batch_shapes(model, count: int) -> dict[str, Any]:
    """Returns what a training step reads of `count` pairs."""
    ids = jax.ShapeDtypeStruct((count, *model.ids_shape), jnp.int32)
    cond = jax.eval_shape(model.encode_ids, model.params, ids)
    for name, array in model.image_cond(np.zeros((count, 4), np.int32)).items():
        cond[name] = jax.ShapeDtypeStruct(array.shape, array.dtype)
    latents = jax.ShapeDtypeStruct((count, *model.latent_shape), jnp.float32)
    number = jax.ShapeDtypeStruct((count,), jnp.int32)
    shapes = {"mean": latents, "std": latents, "cond": cond}
    return shapes | {"concept": number, "index": number}


def _placed(tree, where):
    if isinstance(where, jax.sharding.Sharding):
        where = jax.tree.map(lambda _: where, tree)

    def place(a, sharding):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    return jax.tree.map(place, tree, where)


def report(
    cfg, topology: str, batch_per_chip: int = 0, step: str = "train", phase: int = 1
) -> dict:
    """Compiles a config's step for a topology; returns what the compiler says of it.

    Args: batch_per_chip: pairs of each group a chip; 0: the config's batches, of all
      chips together. step: of STEPS. phase: see `train_step`.
    Raises: DoesNotFit; UserError for a topology, config or batch that cannot be.
    """
    chip = CHIPS[chip_of(topology)]
    mesh = sharding.make_mesh(devices_of(topology), cfg.hardware.mesh.to_dict())
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    groups = base.load(cfg.method).groups
    for group in groups:
        cfg[group].update(NO_DATA)
        if batch_per_chip:
            cfg[group].batch = batch_per_chip * parts
    run = train.resolve(cfg)
    for name, group in run.data.items():
        accumulated = run.hardware.grad_accum_steps
        sharding.check_batch(f"{name}.batch", group.batch, mesh, accumulated)
    start = time.perf_counter()
    if step == "train":
        program, args = train_step(run, mesh, phase)
        trained = args[0].params
        batches = {name: a["index"].shape[0] for name, a in args[2].items()}
    else:
        batches = {"unet": run.data[groups[0]].batch}
        program, args = unet_step(run, mesh, batches["unet"])
        trained = args[0]
    lowered = program.lower(*args)
    traced = time.perf_counter()
    compiled = compile_lowered(lowered)
    seconds = {"trace": traced - start, "compile": time.perf_counter() - traced}
    return {
        "topology": topology,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "step": step,
        "phase": phase,
        "method": run.method,
        "model": run.model,
        "batch_per_chip": {name: count / parts for name, count in batches.items()},
        "latents": list(abstract_model(run).latent_shape),
        "compute_dtype": run.compute_dtype,
        "attention": run.hardware.attention,
        "remat": run.hardware.remat,
        **account(compiled, chip),
        "trained_bytes": sum(a.size * a.dtype.itemsize for a in trained.values()),
        "seconds": {name: round(s, 1) for name, s in seconds.items()},
        "versions": versions(),
    }


def compile_lowered(lowered):
    """Returns the compiled program.

    Raises: DoesNotFit if the chip has too little memory.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        match = _TOO_LARGE.search(str(error))
        unit = {"G": 2**30, "M": 2**20}
        used = float(match[1]) * unit[match[2]] if match else math.inf
        raise DoesNotFit(used) from error
