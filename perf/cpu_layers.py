# SPDX-License-Identifier: Apache-2.0
"""Which way to compute a layer is the fastest on this CPU, with this jaxlib?

    python perf/cpu_layers.py --parts conv --parts norm --cores 1

Parts: conv, 3x3, by XLA or as one matrix product (`Kernels.conv`), forwards and each
way backwards; norm, of groups and of channels, by XLA or as products (`Kernels.norm`),
forwards and with gradients of all that goes in; gate, the gated layer of a transformer,
as here and as XLA has it; attention, as here and with all scores at once; product, of
few or many rows and a dense layer's kernel. Attention and products also as PyTorch has
them, where it is installed. Shapes of emoji-sd, 32 examples, and of Stable Diffusion
1.5, one. The rules of `gift_jax/models/kernels.py` are made of this; where a newer
jaxlib says otherwise, they should follow. Prints one JSON object, milliseconds: the
medians of --repeats turns. On CPUs alone.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time

import numpy as np
import vs_pytorch

from gift_jax.runtime import cli
from gift_jax.runtime.errors import at_least

CONVS = (  # the image, the channels made
    ((32, 8, 8, 64), 64),
    ((32, 8, 8, 192), 64),
    ((32, 4, 4, 128), 128),
    ((32, 2, 2, 192), 192),
    ((1, 64, 64, 320), 320),
    ((1, 32, 32, 320), 320),
    ((1, 32, 32, 640), 640),
    ((1, 16, 16, 1280), 1280),
    ((1, 8, 8, 1280), 1280),
)
NORMS = ((32, 64, 64), (32, 64, 192), (32, 16, 320), (1, 4096, 320), (1, 256, 1280))
GATES = ((32, 64, 64), (32, 16, 128), (1, 1024, 640))
ATTENTIONS = ((1, 4096, 8, 40), (1, 1024, 8, 80), (1, 256, 8, 160))
PRODUCTS = (  # rows, channels, channels made
    *((16, 11520, 1280), (64, 11520, 1280), (256, 11520, 1280)),
    *((64, 1280, 1280), (1024, 320, 1280), (4096, 4096, 4096)),
)
SPIN_S = 0.05  # seconds; for 0.01 after its work PyTorch's threads keep the cores


def convolutions():
    """Yields (name, ways, arguments) of each convolution."""
    import jax

    from gift_jax.models import kernels

    def by_xla(x, w):
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=names
        )

    def by_product(x, w):
        return kernels.conv_as_matmul(x, w, None, (1, 1), ((1, 1), (1, 1)))

    for image, made in CONVS:
        x, w = draw(*image), draw(3, 3, image[-1], made)
        ways = {}
        for name, f in {"xla": by_xla, "matmul": by_product}.items():
            ways[name] = lambda x, w, g, f=f: f(x, w)
            ways[f"{name}, of the image"] = lambda x, w, g, f=f: jax.vjp(
                lambda x: f(x, w), x
            )[1](g)
            ways[f"{name}, of the kernel"] = lambda x, w, g, f=f: jax.vjp(
                lambda w: f(x, w), w
            )[1](g)
        yield f"conv {image} to {made}", ways, (x, w, draw(*image[:3], made))


def attention():
    """Yields the same of attention of tokens to themselves, "B N H D"."""
    from gift_jax.models.kernels import Kernels

    for shape in ATTENTIONS:
        ways = both_ways("as here", Kernels().attend)
        ways |= both_ways("plain", Kernels(attention="plain").attend)
        args = draw(*shape), draw(*shape), draw(*shape), draw(*shape)
        if torch := installed_torch():
            q, k, v, g = (torch.tensor(np.asarray(a)).transpose(1, 2) for a in args)
            attend, given = torch.nn.functional.scaled_dot_product_attention, (q, k, v)

            def forwards(*_, attend=attend, given=given):
                with torch.no_grad():
                    return attend(*given)

            def both(*_, attend=attend, given=given, g=g):
                leaves = [a.detach().requires_grad_() for a in given]
                return torch.autograd.grad(attend(*leaves), leaves, g)

            ways |= {"pytorch": forwards, "pytorch, with gradients": both}
        yield f"attention {shape}", ways, args


def products():
    """Yields the same of products with a dense layer's kernel, and its transpose."""
    for rows, channels, made in PRODUCTS:
        x, w, g = draw(rows, channels), draw(channels, made), draw(rows, made)
        ways = {
            "xla": lambda x, w, g: x @ w,
            "xla, of the rows": lambda x, w, g: g @ w.T,
        }
        if torch := installed_torch():
            a, b, c = (torch.tensor(np.asarray(array)) for array in (x, w, g))
            ways |= {
                "pytorch": lambda *_, a=a, b=b: a @ b,
                "pytorch, of the rows": lambda *_, b=b, c=c: c @ b.T,
            }
        yield f"product {rows}x{channels} to {made}", ways, (x, w, g)


def both_ways(name: str, f) -> dict:
    """Returns f, and its gradients; the last argument given is that of its output."""
    import jax

    return {
        name: lambda *args: f(*args[:-1]),
        f"{name}, with gradients": lambda *args: jax.vjp(f, *args[:-1])[1](args[-1]),
    }


def installed_torch():
    """Returns PyTorch, with as many threads as XLA has, or None."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(int(os.environ["NPROC"]))
    return torch


def layers(part: str):
    """Yields the same of each norm or gated layer."""
    import flax.linen as nn
    import jax

    from gift_jax.models import hooks
    from gift_jax.models.kernels import Kernels

    def ways_of(module, how: dict):
        ways = {}
        for name, choice in how.items():

            def apply(params, x, choice=choice):
                with hooks.exact(choice):
                    return module.apply(params, x)

            ways |= both_ways(name, apply)
        return ways

    for shape in NORMS if part == "norm" else GATES:
        channels, x = shape[-1], draw(*shape)
        made, how = shape, {way: Kernels(norm=way) for way in ("xla", "matmul")}
        modules = {"groups": nn.GroupNorm(32), "channels": nn.LayerNorm()}
        if part == "gate":
            made = (*shape[:-1], 4 * channels)
            how = {"as here": Kernels(), "xla": Kernels(platform="tpu")}
            modules = {"gate": hooks.attention_flax.FlaxGEGLU(channels)}
        for name, module in modules.items():
            params = module.init(jax.random.key(0), x)
            yield f"{name} {shape}", ways_of(module, how), (params, x, draw(*made))


def draw(*shape):
    import jax.numpy as jnp

    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def measure(ways: dict, args: tuple, repeats: int) -> dict[str, float]:
    """Returns the milliseconds of each way; they take turns."""
    import jax

    from gift_jax.runtime import malloc

    compiled = {
        name: f if name.startswith("pytorch") else jax.jit(f)
        for name, f in ways.items()
    }
    for f in compiled.values():
        for _ in range(2):
            jax.block_until_ready(f(*args))
    malloc.close_gaps()  # as `gift_jax.loop` does
    seconds = {name: [] for name in ways}
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
    "norm": functools.partial(layers, "norm"),
    "gate": functools.partial(layers, "gate"),
    "attention": attention,
    "product": products,
}


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--parts", action="append", choices=PARTS, help="default: all")
    flags.add_argument("--cores", type=int, default=1, help="XLA's threads")
    flags.add_argument("--repeats", type=int, default=9)
    args = flags.parse_args()
    at_least("--cores", args.cores, 1)
    at_least("--repeats", args.repeats, 1)
    os.environ["NPROC"] = str(args.cores)  # before JAX starts
    os.environ["JAX_PLATFORMS"] = "cpu"

    import jaxlib

    from gift_jax.runtime.devices import init_jax

    init_jax()
    found = {"jaxlib": jaxlib.__version__, "processor": vs_pytorch.processor()}
    found["cores"] = args.cores
    for part in args.parts or PARTS:
        for name, ways, given in PARTS[part]():
            found[name] = measure(ways, given, args.repeats)
            line = json.dumps({name: found[name]})
            print(line, file=sys.stderr, flush=True)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    cli.run_main(main)
