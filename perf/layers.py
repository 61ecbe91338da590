# SPDX-License-Identifier: Apache-2.0
"""What do the fast versions of a model's layers save, here, with this jaxlib?

    python perf/layers.py --parts attention --parts step --cores 1
    python perf/layers.py --parts kernels --batch 4 --platform cuda

Parts: conv and norm, by XLA and as matrix products; attention, all scores at once and
in chunks, and as PyTorch has it where that is installed; step, forward and backward of
emoji-sd's UNet for its cross-attention, as chosen here and with each operation's
reference instead. Layers have shapes of emoji-sd, 32 examples, and of Stable Diffusion
1.5, one. What `gift_jax.models.ops` chooses on CPUs is made of this. kernels: for
accelerators, Stable Diffusion 1.5's attention at 64x64 latents by type: what `auto`
takes here, `plain` and, on GPUs, `cudnn`; also how far their values and gradients are
from `plain` in float32, norms of differences over norms. Prints one JSON object,
milliseconds: the medians of --repeats turns.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import time

import numpy as np
import workloads

from gift_jax.runtime import cli
from gift_jax.runtime.errors import at_least

CONVS = (  # the image, the channels of the result
    ((32, 8, 8, 64), 64),
    ((32, 4, 4, 128), 128),
    ((32, 2, 2, 192), 192),
    ((1, 64, 64, 320), 320),
    ((1, 32, 32, 640), 640),
    ((1, 8, 8, 1280), 1280),
)
NORMS = ((32, 64, 64), (32, 64, 192), (1, 4096, 320), (1, 256, 1280))
ATTENTIONS = ((1, 4096, 8, 40), (1, 1024, 8, 80), (1, 256, 8, 160))
KERNEL_SHAPES = {  # queries, keys, a head's size
    "self 64x64": (4096, 4096, 40),
    "self 32x32": (1024, 1024, 80),
    "self 16x16": (256, 256, 160),
    "cross 64x64": (4096, 77, 40),
    "cross 32x32": (1024, 77, 80),
}
HEADS = 8
STEP_EXAMPLES = 4
SPIN_S = 0.05  # seconds; for 0.01 after its work PyTorch's threads keep the cores


def convolutions():
    """Yields (name, functions by name, arguments) of each convolution."""
    from gift_jax.models.ops import conv

    functions = {"xla": conv.conv_reference, "product": conv.conv_as_product}
    padding = ((1, 1), (1, 1))
    for image, channels in CONVS:
        arrays = draw(*image), draw(3, 3, image[-1], channels)
        chosen = {}
        for name, f in functions.items():
            chosen |= both_passes(name, lambda x, w, f=f: f(x, w, 1, padding))
        arrays += (draw(*image[:3], channels),)
        yield f"conv {image} to {channels}", chosen, arrays


def normalizations():
    """Yields the same of each norm."""
    from gift_jax.models.ops import norms

    for shape in NORMS:
        channels = shape[-1]
        arrays = draw(*shape), draw(channels), draw(channels), draw(*shape)
        chosen = both_passes(
            "xla", lambda x, s, b: norms.group_norm_reference(x, s, b, 32, 1e-5)
        ) | both_passes("products", lambda x, s, b: norms.group_norm(x, s, b, 32, 1e-5))
        yield f"group norm {shape}", chosen, arrays
        rows = (shape[0] * shape[1], channels)
        arrays = draw(*rows), draw(channels), draw(channels), draw(*rows)
        chosen = both_passes(
            "xla", lambda x, s, b: norms.layer_norm_reference(x, s, b, 1e-5)
        ) | both_passes("products", lambda x, s, b: norms.layer_norm(x, s, b, 1e-5))
        yield f"layer norm {rows}", chosen, arrays


def attentions():
    """Yields the same of attention of tokens to themselves, "B N H D"."""
    from gift_jax.models.ops import attention

    for shape in ATTENTIONS:
        chosen = both_passes("reference", attention.attention_reference)
        chosen |= both_passes("chunked", attention.chunked_attention)
        arrays = [draw(*shape) for _ in range(4)]
        yield f"attention {shape}", chosen | torch_attention(arrays), arrays


def torch_attention(arrays) -> dict:
    """Returns PyTorch's attention and its gradients, or {} where there is none."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(int(os.environ["NPROC"]))  # as many as XLA has
    *qkv, g = (torch.tensor(np.asarray(a)).transpose(1, 2) for a in arrays)
    attend = torch.nn.functional.scaled_dot_product_attention

    def forward(*_):
        with torch.no_grad():
            return attend(*qkv)

    def both(*_):
        leaves = [a.detach().requires_grad_() for a in qkv]
        return torch.autograd.grad(attend(*leaves), leaves, g)

    return {"pytorch": forward, "pytorch, with gradients": both}


def measure_kernels(args) -> dict:
    """Returns distances and milliseconds of attention by type, shape and choice."""
    import jax.numpy as jnp

    rng, results = np.random.default_rng(0), {}
    for dtype in ("bfloat16", "float32"):
        for name, (queries, keys, size) in KERNEL_SHAPES.items():
            rows = queries, keys, keys, queries  # q, k, v and the output's gradient
            arrays = [rng.normal(size=(args.batch, n, HEADS, size)) for n in rows]
            arrays = [jnp.asarray(a, dtype) for a in arrays]
            label = f"{dtype}, {name}"
            results[label] = _measure_attention(arrays, args.repeats)
            print(json.dumps({label: results[label]}), file=sys.stderr, flush=True)
    return results


def _measure_attention(arrays, repeats: int) -> dict:
    import jax
    import jax.numpy as jnp
    import parity

    from gift_jax.models.ops.kernels import Kernels

    @functools.partial(jax.jit, static_argnums=0)
    def attend(kernels, q, k, v, g):
        out, back = jax.vjp(kernels.attend, q, k, v)
        return out, back(g)

    wide = [a.astype(jnp.float32) for a in arrays]
    with jax.default_matmul_precision("highest"):
        values, gradients = attend(Kernels("plain"), *wide)
    choices, results = ["auto", "plain"], {}
    if jax.default_backend() == "gpu" and arrays[0].dtype.itemsize == 2:
        choices.append("cudnn")
    for choice in choices:
        kernels = Kernels(choice)
        out, grads = attend(kernels, *arrays)

        def run(kernels=kernels):
            jax.block_until_ready(attend(kernels, *arrays))

        chosen = kernels.attention_for(*arrays[:2])
        milliseconds = 1e3 * workloads.median_seconds(run, repeats)
        results[choice if chosen == choice else f"{choice}: {chosen}"] = {
            "values": parity.distance(out, values),
            "gradients": parity.distance(grads, gradients),
            "ms": float(f"{milliseconds:.3g}"),
        }
    return results


def steps():
    """Yields the same of emoji-sd's UNet, each operation replaced by its reference."""
    import jax
    import jax.numpy as jnp

    from gift_jax.models import sd
    from gift_jax.models.load import load_model
    from gift_jax.models.ops.kernels import Kernels
    from gift_jax.models.trainable import select_trainable
    from gift_jax.state import merge_params

    model = load_model("emoji-sd")
    trained, frozen = select_trainable(model.params["unet"], "cross_attention")
    width = model.text_encoder.config.hidden_size
    z = draw(STEP_EXAMPLES, *model.latent_shape)
    c = draw(STEP_EXAMPLES, model.max_length, width)
    t = jnp.arange(STEP_EXAMPLES)

    def gradient(kernels, trained, frozen, z, c):
        def loss(trained):
            unet = model.unet.clone(kernels=kernels)
            params = merge_params(trained, frozen)
            return jnp.mean(sd.apply_unet(unet, params, z, t, c)[0] ** 2)

        return jax.grad(loss)(trained)

    chosen, references = Kernels(), {"conv": "xla", "norm": "xla"}
    variants = {"as chosen": chosen} | {
        f"{name} by XLA": dataclasses.replace(chosen, **{name: value})
        for name, value in references.items()
    }
    functions = {
        name: functools.partial(gradient, kernels) for name, kernels in variants.items()
    }
    yield "step of emoji-sd", functions, (trained, frozen, z, c)


def both_passes(name: str, f) -> dict:
    """Returns f, and its gradients; the last argument given is that of its output."""
    import jax

    return {
        name: lambda *args: f(*args[:-1]),
        f"{name}, with gradients": lambda *args: jax.vjp(f, *args[:-1])[1](args[-1]),
    }


def draw(*shape):
    import jax.numpy as jnp

    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def measure(functions: dict, args: tuple, repeats: int) -> dict[str, float]:
    """Returns the milliseconds of each function; they take turns."""
    import jax

    compiled = {
        name: f if name.startswith("pytorch") else jax.jit(f)
        for name, f in functions.items()
    }
    for f in compiled.values():
        for _ in range(2):
            jax.block_until_ready(f(*args))
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, f in compiled.items():
            jax.block_until_ready(f(*args))  # wakes the threads
            clock = time.perf_counter()
            jax.block_until_ready(f(*args))
            seconds[name].append(time.perf_counter() - clock)
            if name.startswith("pytorch"):
                time.sleep(SPIN_S)
    return {k: round(1e3 * statistics.median(s), 3) for k, s in seconds.items()}


PARTS = {
    "conv": convolutions,
    "norm": normalizations,
    "attention": attentions,
    "step": steps,
}


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = (*PARTS, "kernels")
    flags.add_argument(
        "--parts", action="append", choices=parts, help="default: all but kernels"
    )
    flags.add_argument("--cores", type=int, default=1, help="XLA's threads")
    flags.add_argument("--platform", default="cpu", help="of JAX: cpu, cuda, tpu")
    flags.add_argument("--batch", type=int, default=4, help="of kernels")
    flags.add_argument("--repeats", type=int, default=9)
    args = flags.parse_args()
    at_least("--cores", args.cores, 1)
    at_least("--batch", args.batch, 1)
    at_least("--repeats", args.repeats, 1)
    os.environ["NPROC"] = str(args.cores)  # before JAX starts
    os.environ["JAX_PLATFORMS"] = args.platform

    import jaxlib

    from gift_jax.runtime.devices import init_jax

    init_jax()
    results = {"jaxlib": jaxlib.__version__, "processor": workloads.processor()}
    results["cores"] = args.cores
    for part in args.parts or PARTS:
        if part == "kernels":
            results["kernels"] = measure_kernels(args)
            continue
        for name, functions, arrays in PARTS[part]():
            results[name] = measure(functions, tuple(arrays), args.repeats)
            line = json.dumps({name: results[name]})
            print(line, file=sys.stderr, flush=True)
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    cli.run_main(main)
