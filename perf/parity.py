# SPDX-License-Identifier: Apache-2.0
"""Does this accelerator compute what a CPU computes?

    python perf/parity.py --parts unet --parts steps

Parts:
  unet   emoji-sd's prediction and its gradient for the cross-attention: how far from
         float32 on the CPU
  steps  twenty of GIFT's outer steps on emoji-sd, here and on the CPU: how far the
         parameters end from each other, of what they moved

Distances are norms of differences over norms. In float32 products use what JAX takes by
default (TF32 on NVIDIA GPUs since Ampere) and, as "highest", all of float32. Prints one
JSON object. --reference: a folder where what the CPU computes is kept, so that it need
not be computed where the accelerator is. On a machine without accelerator the CPU is
compared with itself. Attention alone: perf/layers.py.
"""

import argparse
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import workloads

from gift_jax.diffusion import squared_error
from gift_jax.models.load import load_model
from gift_jax.runtime import cli
from gift_jax.state import merge_params
from gift_jax.training import sharding

UNET_BATCH = 16
STEPS = 20


def on_cpu(work, folder: str, name: str) -> list[np.ndarray]:
    """Returns the arrays that `work` gives on the CPU, in float32 throughout.

    Args: folder, name: where they are kept, or looked for; "" to keep none.
    """
    path = pathlib.Path(folder) / f"{name}.npz"
    if folder and path.exists():
        with np.load(path) as arrays:
            return [arrays[key] for key in arrays.files]
    with jax.default_device(jax.devices("cpu")[0]):
        with jax.default_matmul_precision("highest"):
            results = [np.asarray(a) for a in jax.tree.leaves(work())]
    if folder:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, *results)
    return results


def distance(result, reference) -> float:
    """Returns the norm of the difference of two trees over the norm of the second."""
    ours, theirs = (
        np.concatenate([np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(t)])
        for t in (result, reference)
    )
    return float(f"{np.linalg.norm(ours - theirs) / np.linalg.norm(theirs):.2g}")


def measure_unet(args) -> dict:
    """Returns the distances of the prediction and the gradient, by type."""

    def work(dtype="float32"):
        model = load_model("emoji-sd", dtype)
        denoiser, split = model.denoiser, model.split("cross_attention")

        def loss(trainable, frozen, batch):
            params, cond = merge_params(trainable, frozen), {"states": batch["states"]}
            out, _ = denoiser.predict(params, batch["z_t"], batch["t"], cond, ())
            return jnp.mean(squared_error(out, batch["eps"])), out

        shapes = model.latent_shape, workloads.text_shape(model)
        batch = workloads.training_batch(*shapes)
        batch = {name: array[:UNET_BATCH] for name, array in batch.items()}
        grad_fn = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (_, out), grads = grad_fn(split.trainable, split.frozen, batch)
        return out, grads

    reference = on_cpu(work, args.reference, "unet")
    results = {}
    for dtype, precision in (
        ("float32", "highest"),
        ("float32", None),
        ("bfloat16", None),
    ):
        with jax.default_matmul_precision(precision):
            out, grads = work(dtype)
        label = f"{dtype}, {precision or 'default'}"
        results[label] = {
            "prediction": distance(out, reference[0]),
            "gradient": distance(grads, reference[1:]),
        }
        print(json.dumps({label: results[label]}), file=sys.stderr, flush=True)
    return results


def measure_steps(args) -> dict:
    """Returns how far apart the parameters end, of what they moved on the CPU."""
    cfg = workloads.gift_config()
    counts = {group: cfg[group].batch for group in ("safe", "harmful")}

    def moved():
        model = load_model("emoji-sd")
        step, state, frozen = workloads.gift_step(model, cfg)
        pairs = workloads.gift_pairs(model, counts, model.latent_shape[-1])
        before = jax.tree.map(np.asarray, state.params)
        for _ in range(STEPS):
            state, _ = step(state, frozen, pairs, jax.random.key(0))
        return jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, before)

    reference, results = on_cpu(moved, args.reference, "steps"), {}
    for precision in ("highest", None):
        with jax.default_matmul_precision(precision):
            label = f"float32, {precision or 'default'}"
            results[label] = distance(moved(), reference)
        print(json.dumps({label: results[label]}), file=sys.stderr, flush=True)
    return results


PARTS = {"unet": measure_unet, "steps": measure_steps}


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--parts", action="append", choices=PARTS, help="default: all")
    flags.add_argument("--reference", default="", help="a folder")
    args = flags.parse_args()
    sharding.make_default_mesh()
    results = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    results |= {part: PARTS[part](args) for part in args.parts or PARTS}
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    cli.run_main(main)
