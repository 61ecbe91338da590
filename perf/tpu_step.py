# SPDX-License-Identifier: Apache-2.0
"""What does a step of Stable Diffusion 1.5 cost on a TPU, next to stock diffusers Flax?

    python perf/tpu_step.py --variants stock --variants none --variants block

One forward and backward pass for the cross-attention parameters, bfloat16, 64x64
latents, compiled here for v5e without a TPU (see gift_jax.compile). stock: diffusers'
modules as they come, which the extra flax-reference has; the others: ours with that
`remat` and our flags of libtpu. Prints one JSON object with TFLOP, GB accessed and GB
of temporaries a chip, and the ratios to stock if it is there.
A variant takes several minutes and up to 8 GB. --fit: also the largest batch that fits.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from gift_jax.compile import child as compile_child
from gift_jax.models.ops import kernels
from gift_jax.models.ops.kernels import Kernels
from gift_jax.models.sd import architectures
from gift_jax.runtime import cli
from gift_jax.runtime.errors import UserError, at_least

VARIANTS = ("stock", "none", "block", "full")
_INTO = "TPU_STEP_INTO"


def measure(variant: str, topology: str, batch: int, model: str, attention: str):
    """Returns `ahead.account` of one variant, with its seconds of compilation."""
    import jax
    import jax.numpy as jnp

    from gift_jax.compile import tpu
    from gift_jax.diffusion import squared_error
    from gift_jax.models import sd
    from gift_jax.models.params import from_config
    from gift_jax.models.sd import stable_diffusion
    from gift_jax.models.trainable import merge_params, select_trainable
    from gift_jax.runtime.devices import init_jax
    from gift_jax.training import sharding

    if variant != "stock":
        init_jax()  # with the flags of libtpu
    mesh = sharding.make_mesh(tpu.devices_of(topology))
    outline = stable_diffusion.abstract_model(
        architectures.MODELS[model], jnp.bfloat16, 512
    )
    unet = outline.unet
    if variant == "stock":
        from diffusers import FlaxUNet2DConditionModel  # of the extra flax-reference

        config = architectures.MODELS[model]["unet"]
        unet = from_config(FlaxUNet2DConditionModel, config, dtype=jnp.bfloat16)
    else:
        unet = unet.clone(kernels=Kernels(attention, remat=variant).on(mesh))

    def loss(trained, frozen, batch):
        params = merge_params(trained, frozen)
        args = batch["z_t"].astype(unet.dtype), batch["t"], batch["text"]
        if variant == "stock":
            out = unet.apply({"params": params}, *args, return_dict=False)[0]
        else:
            out, _ = sd.apply_unet(unet, params, *args)
        return jnp.mean(squared_error(out, batch["eps"]))

    trained, frozen = select_trainable(outline.params["unet"], "cross_attention")
    count = batch * mesh.size
    latents = jax.ShapeDtypeStruct((count, *outline.latent_shape), jnp.float32)
    text = (count, outline.max_length, outline.text_encoder.config.hidden_size)
    batch = {
        "z_t": latents,
        "eps": latents,
        "t": jax.ShapeDtypeStruct((count,), jnp.int32),
        "text": jax.ShapeDtypeStruct(text, jnp.bfloat16),
    }

    def place(tree, where, dtype=None):
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, dtype or a.dtype, sharding=where),
            tree,
        )

    whole = sharding.replicated(mesh)
    args = (
        place(trained, whole, jnp.float32),
        place(frozen, whole),
        place(batch, sharding.batch_sharding(mesh)),
    )
    step = jax.jit(jax.grad(loss), out_shardings=whole)
    lowered = step.lower(*args)
    began = time.perf_counter()
    compiled = tpu.compile_lowered(lowered)
    seconds = time.perf_counter() - began
    if text_file := os.environ.get("TPU_STEP_HLO"):  # to look at
        pathlib.Path(text_file).write_text(compiled.as_text())
    chip = tpu.CHIPS[tpu.chip_of(topology)]
    return tpu.account(compiled, chip) | {"compile_s": round(seconds, 1)}


def in_child(args, variant: str) -> dict:
    """Returns what a child process, which loads the TPU compiler, finds."""
    with tempfile.TemporaryDirectory() as folder:
        into = pathlib.Path(folder) / "found.json"
        environ = compile_child.environment() | {_INTO: str(into)}
        if "TPU_STEP_HLO" in os.environ:
            environ["TPU_STEP_HLO"] = os.environ["TPU_STEP_HLO"]
        flags = [f"--{name}={getattr(args, name)}" for name in _SHARED]
        flags += ["--fit"] * args.fit
        command = [sys.executable, __file__, f"--variants={variant}", *flags]
        if code := subprocess.run(command, env=environ).returncode:
            sys.exit(code)  # it has said why
        return json.loads(into.read_text())


_SHARED = ("topology", "batch", "model", "attention")


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--variants", action="append", choices=VARIANTS)
    flags.add_argument("--topology", default="v5e:2x2")
    flags.add_argument("--batch", type=int, default=4, help="examples a chip")
    flags.add_argument("--model", default="sd15", choices=tuple(architectures.MODELS))
    flags.add_argument(
        "--attention", default="auto", choices=kernels.CHOICES["attention"]
    )
    flags.add_argument("--fit", action="store_true")
    args = flags.parse_args()
    at_least("--batch", args.batch, 1)
    compile_child.check_compiler()
    variants = args.variants or ["stock", "none", "block"]
    if _INTO in os.environ:
        from gift_jax.compile import tpu

        def attempt(batch):
            given = args.topology, batch, args.model, args.attention
            try:
                found = measure(variants[0], *given)
            except tpu.DoesNotFit as error:
                print(batch, error, file=sys.stderr, flush=True)
                raise
            print(batch, found["hbm_bytes"], file=sys.stderr, flush=True)
            return found | {"batch": batch}

        tpu.chip_of(args.topology)
        try:
            found = tpu.fit(attempt, args.batch) if args.fit else attempt(args.batch)
        except tpu.DoesNotFit as error:
            hint = "a smaller --batch" if args.batch > 1 else "--variants=block"
            raise UserError(
                f"--batch={args.batch}: {variants[0]} {error}; try {hint}"
            ) from error
        pathlib.Path(os.environ[_INTO]).write_text(json.dumps(found))
        return 0
    found = {variant: in_child(args, variant) for variant in variants}
    stock = found.get("stock")
    for variant, one in found.items():
        if stock and variant != "stock":
            one["of_stock"] = {
                name: round(_get(one, name) / _get(stock, name), 3)
                for name in ("flops", "bytes_accessed", "temporaries", "batch")
            }
    print(json.dumps(found, indent=1))
    return 0


def _get(found, name):
    return found["hbm_bytes"][name] if name == "temporaries" else found[name]


if __name__ == "__main__":
    cli.run_main(main)
