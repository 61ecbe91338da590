# SPDX-License-Identifier: Apache-2.0
"""What every run that trains sets up: fields, mesh, batches, the loop, the export."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from gift_jax.data import pipeline
from gift_jax.data.cache import DataGroup
from gift_jax.models import exports, load, model_card, safetensors_io
from gift_jax.models.base import PartitionRules
from gift_jax.models.ops.kernels import CHOICES
from gift_jax.runtime import config, processes
from gift_jax.runtime.devices import cpu_devices_for, init_jax
from gift_jax.runtime.errors import UserError
from gift_jax.state import State, Step, run_key
from gift_jax.training import loop, sharding


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The fields of a run's checkpoints."""

    every: int = config.number(100, low=0, doc="steps; 0: only at the end")
    keep: int = config.number(2, low=1, doc="how many of the newest")


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each axis of the mesh; 0: all that the others leave."""

    data: int = config.number(0, low=0, doc="each has a part of the batch")
    fsdp: int = config.number(
        1, low=0, doc="each has a part of the batch and of what trains"
    )
    tensor: int = config.number(1, low=0, doc="each has a part of every large matrix")

    def check(self, field: str) -> None:
        sharding.check_mesh(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Processes:
    """Several processes of one run, where the environment does not say it."""

    coordinator: str = config.value("", '"HOST:PORT" of process 0')
    count: int = config.number(0, low=0, doc="of processes")
    index: int = config.number(-1, low=-1, doc="of this one, from 0")

    def check(self, field: str) -> None:
        processes.check(self)


@dataclasses.dataclass(frozen=True)
class Hardware:
    """How a run uses its devices; none of it changes what is computed."""

    attention: str = config.choice(
        "auto", CHOICES["attention"], "kernel; flash: TPU, cudnn: GPU"
    )
    remat: str = config.choice(
        "none", CHOICES["remat"], "what is computed again for the gradient"
    )
    grad_accum_steps: int = config.number(
        1, low=1, doc="parts of a batch, computed one after the other"
    )
    cpu_devices: int = config.number(
        0, low=0, doc="to make of a machine without accelerator; 0: one a core"
    )
    mesh: MeshShape = config.group(MeshShape)
    shard_frozen: bool = config.value(
        False, "divide over fsdp what does not train, too"
    )
    processes: Processes = config.group(Processes)


@dataclasses.dataclass(frozen=True)
class Run(load.ModelFields):
    """The fields of every run that trains."""

    seed: int = config.number(0, low=0, doc="of everything that the run draws")
    steps: int = config.number(1000, low=0, doc="of the whole run")
    log_every: int = config.number(20, low=1, doc="steps between two lines of metrics")
    verify: str = config.choice(
        "auto",
        ("auto", "on", "off"),
        "that PyTorch loads and draws the export alike; auto: if it is installed, a "
        "failure is a warning; on: a failure is exit code 1",
    )
    checkpoints: Checkpoints = config.group(Checkpoints)
    hardware: Hardware = config.group(Hardware)


def check_batches(run: Run, data: Mapping[str, DataGroup]) -> None:
    """Raises UserError for a batch that does not divide by grad_accum_steps."""
    parts = run.hardware.grad_accum_steps
    for name, group in data.items():
        if group.batch % parts:
            fix = parts * max(1, group.batch // parts)
            raise UserError(
                f"config.{name}.batch={group.batch} must divide by config.hardware."
                f"grad_accum_steps={parts}; try --config.{name}.batch={fix}"
            )


def make_run_mesh(run: Run, data: Mapping[str, DataGroup]) -> Mesh:
    """Joins the other processes and returns the mesh, every batch checked against it.

    Raises: UserError naming the field of a batch or mesh that does not fit.
    """
    hardware, shape = run.hardware, dataclasses.asdict(run.hardware.mesh)
    count, parts = hardware.cpu_devices, hardware.grad_accum_steps
    if not count and processes.are_several(hardware.processes):
        count = 1
    elif not count:
        count = cpu_devices_for([g.batch / parts for g in data.values()], shape)
    init_jax(count)
    processes.connect(hardware.processes)
    devices = jax.devices()
    if devices[0].platform == "cpu" and jax.process_count() == 1:
        devices = devices[:count]  # an earlier run of this process may have made more
    mesh = sharding.make_mesh(devices, shape)
    for name, group in data.items():
        sharding.check_batch(f"{name}.batch", group.batch, mesh, parts)
    return mesh


def load_run_model(run: Run, mesh: Mesh | None = None):
    """Returns the model that a run names; mesh: that it trains on, if it does."""
    return load.load_named(run).with_kernels(load.kernels_of(run, mesh))


def make_batches(
    sources: Mapping[str, Any],
    sizes: Mapping[str, int],
    seed: int,
    role: str,
    part: tuple[int, int] = (0, 1),
) -> loop.Batches:
    """Returns the named sources' shuffled batches, advanced and saved together.

    Args: role: defense, attack or post_finetune; of `run_key`. part: which part of
      every batch to read, of how many; see `sharding.process_slice`.
    """
    orders = {name: run_key(seed, f"{role}/order/{name}") for name in sources}
    return loop.Batches(
        {
            name: pipeline.batches(
                source,
                sizes[name],
                int(jax.random.bits(orders[name])),
                drop_remainder=False,
                process_index=part[0],
                process_count=part[1],
            )
            for name, source in sources.items()
        }
    )


def run_shardings(
    run: Run, mesh: Mesh, rules: PartitionRules, state: State, frozen: Any
) -> tuple:
    """Returns where a run's state and its frozen arrays lie on the mesh.

    Args: rules: the model's.
    """
    whole = () if run.hardware.shard_frozen else ("fsdp",)
    return (
        sharding.shardings(mesh, state, rules),
        sharding.shardings(mesh, frozen, rules, repeat=whole),
    )


def run_loop(
    run: Run,
    mesh: Mesh,
    state: State,
    step: Step,
    frozen: Any,
    data: loop.Batches,
    workdir: pathlib.Path,
    role: str,
    *,
    rules: PartitionRules,
    name: str,
    callbacks: Sequence[loop.Callback] = (),
    checkpoint_last: bool = True,
) -> State:
    """Places everything on the mesh and takes the run's steps.

    Args: role: of `run_key`. rules: the model's, of where parameters lie. name: word of
      the progress line. checkpoint_last: see `loop.Options`.
    """
    where = run_shardings(run, mesh, rules, state, frozen)
    state_shardings, frozen_shardings = where
    return loop.run(
        sharding.put(state, state_shardings),
        step,
        sharding.put(frozen, frozen_shardings),
        data,
        sharding.replicate(mesh, run_key(run.seed, f"{role}/steps")),
        options=loop.Options(
            steps=run.steps,
            log_every=run.log_every,
            checkpoint_every=run.checkpoints.every,
            checkpoint_last=checkpoint_last,
            keep=run.checkpoints.keep,
            name=name,
        ),
        workdir=workdir,
        place=lambda batch: sharding.put_batch(mesh, batch),
        callbacks=callbacks,
    )


def export(
    model,
    trained: Mapping[str, jax.Array],
    out: pathlib.Path,
    summary: model_card.RunSummary,
    tokenizer=None,
) -> None:
    """Writes RUN/export, a diffusers folder with the trained tensors replaced.

    Its README.md says what was done, from the run's config.json and metrics.jsonl.

    Args: summary: of the run, in words. tokenizer: written in place of the base's.
    Raises: UserError if the base model is not what it was when the run began.
    """
    trained = processes.to_host(dict(trained))
    if not processes.is_main_process():
        return
    recorded = safetensors_io.read_json(out.parent / "config.json")["base_sha256"]
    current = model.folder.content_hash()
    if current != recorded:
        raise UserError(
            f"{model.path} changed while the run went on (its content was "
            f"{recorded[:12]}, is {current[:12]}); put the model back and run the same "
            "command again"
        )
    folder = model.folder
    exports.export(
        model.path,
        folder.adapted_params() | trained,
        out,
        model.variant,
        tokenizer=tokenizer or folder.added_tokenizer(),
        readme=model_card.of_run(out.parent, folder, summary),
    )
    logging.info("exported model: %s", out)
