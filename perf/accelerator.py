# SPDX-License-Identifier: Apache-2.0
"""Does this accelerator compute what a CPU computes, and what does a choice cost on it?

    python perf/accelerator.py --parts attention --parts unet --parts steps
    python perf/accelerator.py --parts remat --model runs/sd15 --batch 16

Parts:
  attention  Stable Diffusion 1.5's shapes at 64x64 latents: how far values and
             gradients of the attention that `auto` takes here are from `plain` in
             float32, next to `plain` and, on GPUs, `cudnn` in the same type, and how
             long each takes
  unet       emoji-sd's prediction and its gradient for the cross-attention: how far
             from float32 on the CPU
  steps      twenty of GIFT's outer steps on emoji-sd, here and on the CPU: how far the
             parameters end from each other, of what they moved
  remat      the full-size outer step in bfloat16 for each `remat`: seconds a step, and
             by the compiler's account its temporaries, TFLOP and bytes accessed.
             --model: a folder of SD 1.5 (perf/random_sd.py writes one); --batch:
             pairs of each group

Distances are norms of differences over norms. In float32 products use what JAX takes by
default (TF32 on NVIDIA GPUs since Ampere) and, as "highest", all of float32. Times are
medians of --repeats. Prints one JSON object. --reference: a folder where what the CPU
computes is kept, so that it need not be computed where the accelerator is. Compiling is
most of the time: minutes a part on GPUs too. On a machine without accelerator, unet and
steps compare the CPU with itself.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import vs_pytorch

from gift_jax.diffusion import squared_error
from gift_jax.models import sd
from gift_jax.models.load import load_model
from gift_jax.models.ops import kernels
from gift_jax.models.ops.kernels import Kernels
from gift_jax.models.trainable import merge_params, select_trainable
from gift_jax.runtime import cli
from gift_jax.runtime.errors import UserError, at_least
from gift_jax.training import sharding

PARTS = ("attention", "unet", "steps", "remat")
SHAPES = {  # queries, keys, a head's size
    "self 64x64": (4096, 4096, 40),
    "self 32x32": (1024, 1024, 80),
    "self 16x16": (256, 256, 160),
    "cross 64x64": (4096, 77, 40),
    "cross 32x32": (1024, 77, 80),
}
HEADS = 8
UNET_BATCH = 16
STEPS = 20


def on_cpu(work, folder: str, name: str) -> list[np.ndarray]:
    """Returns the arrays that `work` gives on the CPU, in float32 throughout.

    Args: folder, name: where they are kept, or looked for; "" to keep none.
    """
    path = pathlib.Path(folder) / f"{name}.npz"
    if folder and path.exists():
        with np.load(path) as kept:
            return [kept[key] for key in kept.files]
    with jax.default_device(jax.devices("cpu")[0]):
        with jax.default_matmul_precision("highest"):
            found = [np.asarray(a) for a in jax.tree.leaves(work())]
    if folder:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, *found)
    return found


def tell(label: str, found) -> None:
    """Says what has been found so far: a part may be stopped before its end."""
    print(json.dumps({label: found}), file=sys.stderr, flush=True)


def distance(found, reference) -> float:
    """Returns the norm of the difference of two trees over the norm of the second."""
    flat = [
        np.concatenate([np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(t)])
        for t in (found, reference)
    ]
    return float(f"{np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1]):.2g}")


def seconds(run, repeats: int) -> float:
    """Returns the median of some calls, each waited for, after two to warm up."""
    taken = []
    for _ in range(repeats + 2):
        clock = time.perf_counter()
        jax.block_until_ready(run())
        taken.append(time.perf_counter() - clock)
    return float(f"{statistics.median(taken[2:]):.3g}")


# --- parts ----------------------------------------------------------------------------


def measure_attention(args) -> dict:
    """Returns distances and seconds by type, shape and kind."""
    rng, found = np.random.default_rng(0), {}
    for dtype in ("bfloat16", "float32"):
        for name, (queries, keys, size) in SHAPES.items():
            rows = queries, keys, keys, queries
            arrays = [rng.normal(size=(args.batch, n, HEADS, size)) for n in rows]
            arrays = [jnp.asarray(a, dtype) for a in arrays]
            label = f"{dtype}, {name}"
            found[label] = _attentions(arrays, args.repeats)
            tell(label, found[label])
    return found


def _attentions(arrays, repeats: int) -> dict:
    """Returns what the kinds of attention are like, by name and what each takes.

    Args: arrays: queries, keys, values and the gradient of what comes of them.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def attend(kernels, q, k, v, g):
        out, back = jax.vjp(kernels.attend, q, k, v)
        return out, back(g)

    wide = [a.astype(jnp.float32) for a in arrays]
    with jax.default_matmul_precision("highest"):
        values, gradients = attend(Kernels("plain"), *wide)
    kinds, found = ["auto", "plain"], {}
    if jax.default_backend() == "gpu" and arrays[0].dtype.itemsize == 2:
        kinds.append("cudnn")
    for kind in kinds:
        kernels = Kernels(kind)
        out, grads = attend(kernels, *arrays)
        run = functools.partial(attend, kernels, *arrays)
        taken = kernels.attention_for(*arrays[:2])
        found[kind if taken == kind else f"{kind}: {taken}"] = {
            "values": distance(out, values),
            "gradients": distance(grads, gradients),
            "seconds": seconds(run, repeats),
        }
    return found


def measure_unet(args) -> dict:
    """Returns the distances of the prediction and the gradient, by type."""

    def work(dtype="float32"):
        model = load_model("emoji-sd", dtype)
        unet = model.unet

        def loss(trained, frozen, d):
            params = merge_params(trained, frozen)
            z_t, text = (d[name].astype(unet.dtype) for name in ("z_t", "text"))
            out, _ = sd.apply_unet(unet, params, z_t, d["t"], text)
            return jnp.mean(squared_error(out, d["eps"])), out

        d = vs_pytorch.training_batch(model.latent_shape, model.max_length, model)
        d = {name: array[:UNET_BATCH] for name, array in d.items()}
        parts = select_trainable(model.params["unet"], "cross_attention")
        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(*parts, d)
        return out, grads

    reference = on_cpu(work, args.reference, "unet")
    found = {}
    for dtype, precision in (
        ("float32", "highest"),
        ("float32", None),
        ("bfloat16", None),
    ):
        with jax.default_matmul_precision(precision):
            out, grads = work(dtype)
        label = f"{dtype}, {precision or 'default'}"
        found[label] = {
            "prediction": distance(out, reference[0]),
            "gradient": distance(grads, reference[1:]),
        }
        tell(label, found[label])
    return found


def measure_steps(args) -> dict:
    """Returns how far apart the parameters end, of what they moved on the CPU."""
    cfg = vs_pytorch.gift_config()

    def moved():
        model = load_model("emoji-sd")
        step, state, frozen = vs_pytorch.gift_step(model, cfg)
        counts = vs_pytorch.sizes("emoji-gift", cfg)
        pairs = vs_pytorch.gift_pairs(model, counts, model.latent_shape[-1])
        before = jax.tree.map(np.asarray, state.params)
        for _ in range(STEPS):
            state, _ = step(state, frozen, pairs, jax.random.key(0))
        return jax.tree.map(
            lambda new, old: np.asarray(new) - old, state.params, before
        )

    reference, found = on_cpu(moved, args.reference, "steps"), {}
    for precision in ("highest", None):
        with jax.default_matmul_precision(precision):
            label = f"float32, {precision or 'default'}"
            found[label] = distance(moved(), reference)
            tell(label, found[label])
    return found


def measure_remat(args) -> dict:
    """Returns what a step costs with each `remat`, compiled side by side."""
    if not args.model:
        raise UserError("--model='' must be a folder of SD 1.5 for remat")
    cfg, found = vs_pytorch.gift_config(), {}
    model = load_model(args.model, "bfloat16")
    counts = {"safe": args.batch, "harmful": args.batch}
    pairs = jax.device_put(vs_pytorch.gift_pairs(model, counts, model.latent_shape[-1]))
    key = jax.random.key(0)

    def compiled(remat):
        chosen = dataclasses.replace(model.kernels, remat=remat)
        chosen = model.with_kernels(chosen)
        step, state, frozen = vs_pytorch.gift_step(chosen, cfg)
        clock = time.perf_counter()
        program = step.lower(state, frozen, pairs, key).compile()
        return program, state, frozen, time.perf_counter() - clock

    with concurrent.futures.ThreadPoolExecutor() as threads:
        programs = dict(
            zip(
                kernels.CHOICES["remat"],
                threads.map(compiled, kernels.CHOICES["remat"]),
                strict=True,
            )
        )
    for remat, (program, state, frozen, took) in programs.items():
        memory, cost = program.memory_analysis(), program.cost_analysis()
        one = found[remat] = {
            "compile_s": round(took, 1),
            "temporaries_GB": round(memory.temp_size_in_bytes / 1e9, 2),
            "TFLOP": round(cost.get("flops", 0) / 1e12, 2),
            "accessed_GB": round(cost.get("bytes accessed", 0) / 1e9, 1),
        }
        kept = [state]

        def run(program=program, frozen=frozen, kept=kept):
            kept[0], metrics = program(kept[0], frozen, pairs, key)
            return metrics

        try:
            one["seconds"] = seconds(run, args.repeats)
            one["pairs_a_second"] = round(2 * args.batch / one["seconds"], 1)
        except jax.errors.JaxRuntimeError as error:
            one["failed"] = str(error).splitlines()[0]
        tell(remat, one)
    return found


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--parts", action="append", choices=PARTS, help="default: all")
    flags.add_argument("--model", default="", help="a folder of SD 1.5, for remat")
    flags.add_argument("--reference", default="", help="a folder, of unet and steps")
    flags.add_argument("--batch", type=int, default=4, help="of attention and remat")
    flags.add_argument("--repeats", type=int, default=9)
    args = flags.parse_args()
    at_least("--batch", args.batch, 1)
    at_least("--repeats", args.repeats, 1)
    sharding.make_default_mesh()
    measures = {
        "attention": measure_attention,
        "unet": measure_unet,
        "steps": measure_steps,
        "remat": measure_remat,
    }
    device = jax.devices()[0]
    found = {"device": device.device_kind, "jax": jax.__version__}
    for part in args.parts or PARTS:
        found[part] = measures[part](args)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    cli.run_main(main)
