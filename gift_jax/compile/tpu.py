# SPDX-License-Identifier: Apache-2.0
"""Compiles the very step that `gift_jax.train` takes for TPUs that are not here.

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
from gift_jax.defenses import base as defenses_base
from gift_jax.models import hub
from gift_jax.models.load import DTYPES, kernels_of, local_folder
from gift_jax.models.sd import architectures, stable_diffusion
from gift_jax.runtime.errors import UserError
from gift_jax.runtime.versions import versions
from gift_jax.state import init_state
from gift_jax.training import loop, setup, sharding

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU chip: bytes of memory, bfloat16 FLOP/s, bytes/s of memory."""

    memory: float
    flops: float
    bandwidth: float


CHIPS = {  # Google Cloud's pages "TPU v4", "v5e", "v5p" and "v6e (Trillium)"
    "v4": Chip(32 * 2**30, 275e12, 1228e9),
    "v5e": Chip(16 * 2**30, 197e12, 819e9),
    "v5p": Chip(95 * 2**30, 459e12, 2765e9),
    "v6e": Chip(32 * 2**30, 918e12, 1640e9),
}
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4}
_SIZES |= {"u32": 4, "f64": 8, "s64": 8, "u64": 8, "s16": 2, "u16": 2}
_COLLECTIVES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
_COLLECTIVE = re.compile(rf" = (\(.*?\)|\S+) ({_COLLECTIVES})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_ATTENTION = re.compile(r"%splash_mha_(fwd|dq|dkv)\S* = \((.*?)\) custom-call\(")
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # matrix products of those kernels
_TOO_LARGE = re.compile(r"(?:Used |HLO temporaries \()([\d.]+)([GM])")


class DoesNotFit(Exception):
    """The program needs more memory than the chip has.

    Attributes: used: bytes, as far as the compiler says (of temporaries alone, where
      it gives up early), or inf.
    """

    def __init__(self, used: float):
        size = f"{used / GB:.1f} GB" if math.isfinite(used) else "more than there is"
        super().__init__(f"needs {size} of a chip")
        self.used = used


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
        said = str(error).splitlines()[0]
        raise UserError(
            f"--topology={topology}: {said}; try v5e:2x2 or v5p:2x2x2"
        ) from error


def abstract_model(cfg) -> stable_diffusion.StableDiffusion:
    """Returns the model that a config names, without its weights.

    Of the published models nothing is downloaded; of another hub id only its configs.
    """
    name, dtype = cfg.model, DTYPES[cfg.compute_dtype]
    if name in architectures.IDS:
        configs = architectures.MODELS[architectures.IDS[name]]
    elif not local_folder(name).exists() and hub.is_id(name):
        folder = hub.fetch(name, cfg.revision, wanted=("*.json", "*/*.json"))
        configs = stable_diffusion.read_configs(folder)
    else:
        configs = stable_diffusion.read_configs(local_folder(name))
    return stable_diffusion.abstract_model(configs, dtype, cfg.resolution)


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """What a plan asks of pairs: the names of their concepts."""

    concept_names: tuple[str, ...] = ("malicious",)


def shapes_of_step(cfg, mesh):
    """Returns (the step of a config's method, what goes in).

    Args: cfg: of `gift_jax.train`; the batches in it are those of all chips together.
    Returns: what goes in is (state, frozen, batch, key) as `loop.run` has them, all
      ShapeDtypeStructs with their sharding.
    Raises: UserError for a method that takes no steps, or has to draw first.
    """
    settings = train.check(cfg)
    method = defenses_base.DEFENSES[cfg.method]
    if method.plan is None or cfg.method == "esd":
        why = "takes no steps" if method.plan is None else "draws before its steps"
        raise UserError(f"config.method={cfg.method} {why}; try method=gift")
    model = abstract_model(cfg)
    model = model.with_kernels(kernels_of(cfg, mesh))
    pairs = dict.fromkeys(method.groups, _Pairs())
    made = {}

    def build(params):
        with_params = model.replace(params=params)
        plan = made["plan"] = method.plan(cfg, settings, with_params, pairs, None)
        abar = stable_diffusion.noise_schedule(model)
        frozen = {"unet": plan.frozen, "abar": abar, **plan.also_frozen}
        return init_state(plan.params, plan.opt), frozen

    state, frozen = jax.eval_shape(build, model.params)
    plan = made["plan"]
    batch = {group: batch_shapes(model, n) for group, n in plan.sizes.items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    where = setup.run_shardings(cfg, mesh, state, frozen)
    shapes = state, frozen, batch, key
    where += (sharding.batch_sharding(mesh), sharding.replicated(mesh))
    return plan.step, tuple(map(_placed, shapes, where))


def batch_shapes(model, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what `job.cached_source` and `pipeline.batches` give of `count` pairs."""
    text = (count, model.max_length, model.text_encoder.config.hidden_size)
    latents = (count, *model.latent_shape)
    shape = jax.ShapeDtypeStruct
    pairs = {"mean": latents, "std": latents, "text": text}
    found = {name: shape(of, jnp.float32) for name, of in pairs.items()}
    return found | dict.fromkeys(("concept", "index"), shape((count,), jnp.int32))


def _placed(tree, where):
    if isinstance(where, jax.sharding.Sharding):
        where = jax.tree.map(lambda _: where, tree)

    def place(a, there):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there)

    return jax.tree.map(place, tree, where)


def report(cfg, topology: str, batch_per_chip: int = 0) -> dict[str, Any]:
    """Compiles a config's step for a topology; returns what the compiler says of it.

    Args: batch_per_chip: pairs of each group a chip; 0: the config's batches, of all
      chips together.
    Raises: DoesNotFit; UserError for a topology, config or batch that cannot be.
    """
    chip = CHIPS[chip_of(topology)]
    mesh = sharding.make_mesh(devices_of(topology), cfg.mesh.to_dict())
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_per_chip:
        for group in ("harmful", "safe"):
            cfg[group].batch = batch_per_chip * parts
    for group in defenses_base.DEFENSES[cfg.method].groups:
        sharding.check_batch(f"{group}.batch", cfg[group].batch, mesh, cfg.accumulate)
    began = time.perf_counter()
    step, args = shapes_of_step(cfg, mesh)
    lowered = loop.compile_step(step, args).lower(*args)
    traced = time.perf_counter()
    compiled = compile_lowered(lowered)
    seconds = {"trace": traced - began, "compile": time.perf_counter() - traced}
    trained = args[0].params
    return {
        "topology": topology,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "method": cfg.method,
        "model": cfg.model,
        "batch_per_chip": {
            group: a["index"].shape[0] / parts for group, a in args[2].items()
        },
        "latents": list(args[2]["harmful"]["mean"].shape[1:]),
        "compute_dtype": cfg.compute_dtype,
        "attention": cfg.attention,
        "remat": cfg.remat,
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
        found = _TOO_LARGE.search(str(error))
        unit = {"G": 2**30, "M": 2**20}
        used = float(found[1]) * unit[found[2]] if found else math.inf
        raise DoesNotFit(used) from error


def account(compiled, chip: Chip) -> dict[str, Any]:
    """Returns memory, work and collectives of a compiled program, all of one chip."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    hlo = compiled.as_text()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    flops = cost["flops"] + attention_flops(hlo)
    moved = cost["bytes accessed"]
    compute, memory_s = flops / chip.flops, moved / chip.bandwidth
    roofline = max(compute, memory_s)
    return {
        "hbm_bytes": parts | {"used": sum(parts.values()), "capacity": chip.memory},
        "flops": flops,
        "bytes_accessed": moved,
        "flops_per_byte": round(flops / moved, 2),
        "roofline_ms": round(1e3 * roofline, 3),
        "compute_fraction": round(compute / roofline, 3),
        "limited_by": "compute" if compute >= memory_s else "memory",
        "collectives": collectives(hlo),
    }


def attention_flops(hlo: str) -> int:
    """Returns FLOP of a compiled program's attention kernels, which XLA leaves out."""
    total = 0
    for kind, results in _ATTENTION.findall(hlo):
        shapes = [dims.split(",") for _, dims in _SHAPE.findall(results)]
        *many, N, D = map(int, max(shapes, key=len))  # the first of those with "B H"
        total += _PRODUCTS[kind] * 2 * math.prod(many) * N * N * D
    return total


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Returns {kind: {count, bytes}} of a compiled program's text; bytes of results."""
    found: dict[str, dict[str, int]] = {}
    for shape, kind, started in _COLLECTIVE.findall(hlo):
        results = [_bytes(*one) for one in _SHAPE.findall(shape)]
        if started and kind != "all-reduce":  # (what goes in, what comes out, ...)
            results = [max(results)]
        one = found.setdefault(kind, {"count": 0, "bytes": 0})
        one["count"] += 1
        one["bytes"] += sum(results)
    return found


def _bytes(kind: str, dims: str) -> int:
    return _SIZES.get(kind, 4) * math.prod(int(d) for d in dims.split(",") if d)


def fit(attempt, low: int = 1, limit: int = 4096) -> dict[str, Any]:
    """Returns the report of the largest batch a chip that fits.

    Temporaries grow nearly in proportion to the batch: one program says where memory
    may be full, two say how it grows, and the answer is tried, with its neighbours,
    until one fits and the next does not.

    Args: attempt: batch -> report, or DoesNotFit. low: the first to try.
    Raises: DoesNotFit if not even one does.
    """
    fitting: dict[int, dict[str, Any]] = {}
    too_large: dict[int, float] = {}

    def test(batch):
        try:
            fitting[batch] = attempt(batch)
        except DoesNotFit as error:
            too_large[batch] = error.used
            if batch == 1:
                raise

    test(low)
    while not fitting:
        test(max(1, min(too_large) // 2))
    while True:
        best, ceiling = max(fitting), min(too_large, default=limit + 1)
        if ceiling == best + 1:
            return fitting[best] | {"tried": sorted([*fitting, *too_large])}
        test(int(np.clip(_guess(fitting, too_large), best + 1, ceiling - 1)))


def _guess(fitting, too_large) -> int:
    """Returns the batch at which memory is full, by a line through two of the sizes.

    With one program alone, as if its temporaries were in proportion to the batch.
    """
    used = {b: r["hbm_bytes"]["used"] for b, r in fitting.items()}
    used |= {b: size for b, size in too_large.items() if math.isfinite(size)}
    capacity = next(iter(fitting.values()))["hbm_bytes"]["capacity"]
    if len(used) == 1:
        [(batch, report)] = fitting.items()
        slope = max(1.0, report["hbm_bytes"]["temporaries"] / batch)
        return int(batch + (capacity - used[batch]) / slope)
    a, b = sorted(used)[-2:]
    slope = max(1.0, (used[b] - used[a]) / (b - a))
    return int(a + (capacity - used[a]) / slope)
