# SPDX-License-Identifier: Apache-2.0
"""What does a whole immunization cost, by arithmetic?

    python perf/cost.py          # six minutes on one CPU core, 3 GB of memory

Prints a table: the parts of an immunization of Stable Diffusion 1.5 and XL, how often
each is done, its floating-point operations, and the minutes that it takes of each
machine. Steps and what is drawn (images to train on, samples before and after) are
those of the configs. Encoding images of your own, compiling, checkpoints and input come
on top.

Operations are XLA's count of the lowered program, from shapes alone, with plain
attention, which it sees whole. Minutes are operations over a fraction of the chips'
peak in bfloat16; or the bytes of what goes into a step and comes out of it, over the
memory's bandwidth, where that is more. The fraction is that of the one step that was
measured: GIFT's on SD 1.5 with 16 pairs a level, on an H200. That smaller batches,
SDXL, drawing and TPUs reach it too is an assumption.

A machine's chips divide a batch. Where the config has fewer pairs than chips, its batch
is one pair for each, as `gift_jax.train` asks: more work, in the same time.
"""

import copy
import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import workloads

from gift_jax import train
from gift_jax.compile import tpu
from gift_jax.compile.hlo import Chip
from gift_jax.defenses import base
from gift_jax.models import sd
from gift_jax.runtime import cli
from gift_jax.runtime.config import load_config
from gift_jax.training import sharding

H200 = Chip(141e9, 989.5e12, 4.8e12)  # NVIDIA's data sheet, without sparsity
MACHINES = {  # name -> (chips, of which kind)
    "v5e-8": (8, tpu.CHIPS["v5e"]),
    "v5p-8": (4, tpu.CHIPS["v5p"]),  # named by its cores, two a chip
    "H200": (1, H200),
}
MEASURED_PAIRS, MEASURED_S = 16, 0.176  # docs/lab/speed.md: SD 1.5, 64x64, an H200
TERA = 1e12


@dataclasses.dataclass(frozen=True)
class Work:
    """A part of an immunization.

    Attributes: count: how often. flops, moved: of once, FLOP and bytes at least. batch:
      pairs that are divided over the chips; 0: as many images as there are chips.
    """

    name: str
    count: int
    flops: float
    moved: float = 0.0
    batch: int = 0

    def minutes(self, chips: int, chip: Chip, fraction: float) -> float:
        """Returns how long all of it takes on a machine."""
        batch = self.batch or chips
        share = math.ceil(batch / chips) / batch
        compute_s = self.flops * share / (fraction * chip.flops)
        return self.count * max(compute_s, self.moved / chip.bandwidth) / 60


@dataclasses.dataclass(frozen=True)
class Passes:
    """FLOP of one image: a pass of the denoiser, decoding, encoding."""

    denoiser: float
    decode: float
    encode: float

    def image(self, steps: int) -> float:
        """Returns FLOP of drawing one, with guidance."""
        return 2 * steps * self.denoiser + self.decode


# --- the immunizations ----------------------------------------------------------------


def configs() -> Iterator[tuple[str, str, object]]:
    """Yields (model, method, config) of every immunization."""
    folder = workloads.ROOT / "configs"
    attacker = load_config(str(folder / "emoji_gift_adversarial.py"))  # no other has it
    for name, model in (("SD 1.5", "sd15"), ("SDXL", "sdxl")):
        cfg = load_config(str(folder / f"{model}_object.py"))
        yield name, "gift", cfg
        yield name, "gift_adversarial", _like(attacker, cfg)
        yield name, "gift_gate", load_config(str(folder / f"{model}_gift_gate.py"))


def _like(cfg, other):
    """Returns a config with the model and the data of another one."""
    cfg = copy.deepcopy(cfg)
    for name in ("model", "resolution", "harmful", "safe", "samples", "hardware"):
        cfg[name] = other[name]
    return cfg


def parts(cfg, passes: Passes) -> list[Work]:
    """Returns the work of one immunization."""
    run = resolve(cfg)
    return [images(cfg, run, passes), *phases(run)]


def resolve(cfg, **fields) -> train.TrainRun:
    """Returns the checked config, for a program that XLA can count.

    Args: fields: of the groups of data, of which a step depends on the batch alone.
    """
    cfg = copy.deepcopy(cfg)
    for group in base.load(cfg.method).groups:
        cfg[group].update(tpu.NO_DATA | fields)
    cfg.compute_dtype = "bfloat16"
    cfg.hardware.attention = "plain"  # in a loop it would be counted once
    return train.resolve(cfg)


def images(cfg, run: train.TrainRun, passes: Passes) -> Work:
    """Returns the work of what a run draws.

    Images to train on, which it encodes too, and samples before and after.
    """
    samples = run.samples
    count = 2 * samples.num * len(samples.prompts)
    flops = count * passes.image(samples.steps)
    for name in run.data:
        group = cfg[name]
        drawn = group.num_generated + group.num_drawn
        encoding = group.augmented_copies * passes.encode
        flops += drawn * (passes.image(group.generation.steps) + encoding)
        count += drawn
    return Work("draw", count, flops / count)


def phases(run: train.TrainRun) -> list[Work]:
    """Returns the steps of every phase of a defense."""
    s, batch = run.settings, run.data["safe"].batch
    steps = [step_work(run, run.steps, batch)]
    if run.method == "gift_gate":
        more = step_work(run, s.preserve_steps, batch, 2)
        names = "detect", "preserve"
    elif run.method == "gift_adversarial":
        # its fine-tuning is the lower level's update, whose loop is counted once
        more = step_work(run, s.post_finetune.steps, batch, 2)
        flops = steps[0].flops + (s.inner_steps - 1) * more.flops
        steps[0] = dataclasses.replace(steps[0], flops=flops)
        names = "immunize", "fine-tune"
    else:
        return [dataclasses.replace(steps[0], name="immunize")]
    both = zip((*steps, more), names, strict=True)
    return [dataclasses.replace(work, name=name) for work, name in both]


# --- what one of each computes --------------------------------------------------------


def step_work(run: train.TrainRun, count: int, batch: int, phase: int = 1) -> Work:
    """Returns the work of `count` training steps."""
    program, args = tpu.train_step(run, _mesh(), phase)
    lowered = program.lower(*args)
    state, frozen = args[:2]
    moved = 2 * _bytes(state) + _bytes(frozen)
    return Work("", count, lowered.cost_analysis()["flops"], moved, batch)


def passes_of(model) -> Passes:
    """Returns the passes of an abstract model."""
    cond = tpu.batch_shapes(model, 1)["cond"]
    z = jax.ShapeDtypeStruct((1, *model.latent_shape), jnp.float32)
    pixels = (1, 3, *(side * model.factor for side in model.latent_shape[1:]))
    x = jax.ShapeDtypeStruct(pixels, jnp.float32)

    def denoiser(params, z, cond):
        return model.network.with_cond(params, cond)(z, jnp.zeros(1))

    def decode(params, z):
        return sd.apply_vae_decode(model.vae, params, z.astype(model.vae.dtype))

    def encode(params, x):
        return sd.apply_vae_encode(model.vae, params, x.astype(model.vae.dtype))

    def flops(program, *args):
        return jax.jit(program).lower(*args).cost_analysis()["flops"]

    unet, vae = model.params["unet"], model.params["vae"]
    return Passes(
        flops(denoiser, unet, z, cond), flops(decode, vae, z), flops(encode, vae, x)
    )


def measured_fraction(cfg) -> float:
    """Returns the share of an H200's peak that the measured step reached."""
    work = step_work(resolve(cfg, batch=MEASURED_PAIRS), 1, MEASURED_PAIRS)
    return work.flops / MEASURED_S / H200.flops


def _mesh():
    return sharding.make_mesh(jax.devices()[:1])


def _bytes(tree) -> int:
    leaves = [a for a in jax.tree.leaves(tree) if not _is_key(a)]
    return sum(a.size * a.dtype.itemsize for a in leaves)


def _is_key(array) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


# --- the table ------------------------------------------------------------------------


def main() -> int:
    cli.parser(__doc__, "cost").parse_args()
    immunizations = list(configs())
    _, _, gift = immunizations[0]
    fraction = measured_fraction(gift)
    passes = {
        model: passes_of(tpu.abstract_model(resolve(cfg)))
        for model, method, cfg in immunizations
        if method == "gift"
    }
    print("TFLOP of an image:\n")
    _print_head("", *(field.name for field in dataclasses.fields(Passes)))
    for model, values in passes.items():
        tera = (f"{v / TERA:.3g}" for v in dataclasses.asdict(values).values())
        _print_row(model, *tera)
    print(f"\nMinutes, at {fraction:.1%} of the peak:\n")
    _print_head("", "part", "times", "TFLOP each", *MACHINES)
    for model, method, cfg in immunizations:
        work, name = parts(cfg, passes[model]), f"{model}, `{method}`"
        for part in work:
            cells = part.name, f"{part.count:,}", f"{part.flops / TERA:.3g}"
            _print_row(name, *cells, *_minutes([part], fraction))
            name = ""
        _print_row("", "all", "", "", *_minutes(work, fraction))
    return 0


def _minutes(work: list[Work], fraction: float) -> list[str]:
    return [
        f"{sum(part.minutes(*machine, fraction) for part in work):.2f}"
        for machine in MACHINES.values()
    ]


def _print_head(*names: str) -> None:
    _print_row(*names)
    _print_row(*["---"] * len(names))


def _print_row(*cells: str) -> None:
    print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    cli.run_main(main)
