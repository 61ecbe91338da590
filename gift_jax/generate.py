# SPDX-License-Identifier: Apache-2.0
"""Draw images with a Stable Diffusion model folder.

Writes one PNG an image (prompt number, image number), grid.png with a row a prompt, and
generate.json with everything needed to draw the same again. An image depends on the
seed and its own number only: not on --num, --batch-size or the machine's devices.

example:
  python -m gift_jax.generate --prompt "a dog, flat style" --num 8 --out images
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import logging
from PIL import Image

from gift_jax.models.load import DTYPES, cpu_devices_to_draw, load_model
from gift_jax.models.sd.adapters import AdapterFiles
from gift_jax.runtime import cli, files, progress
from gift_jax.runtime.errors import UserError
from gift_jax.runtime.versions import versions
from gift_jax.sampling import grid, schedules
from gift_jax.sampling.images import draw_images
from gift_jax.training import sharding


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__, "generate")
    add = parser.add_argument
    add("--prompt", action="append", required=True, help="what to draw; repeatable")
    add("--out", required=True, help="folder to write to")
    add(
        "--model",
        default="emoji-sd",
        help="a diffusers folder, hub id or single file (default %(default)s)",
    )
    add("--revision", default="", help="of a hub id: branch, tag or commit")
    add("--variant", default="", help="of the weight files, such as fp16")
    for name, meaning in (
        ("lora", "FILE[:SCALE], a LoRA by the names of diffusers, peft or kohya"),
        ("textual-inversion", "FILE[:TOKEN], learned embeddings"),
        ("unet-tensors", "FILE, safetensors in place of the UNet's own"),
    ):
        add(f"--{name}", action="append", default=[], help=f"{meaning}; repeatable")
    add("--resolution", type=int, default=0, help="pixels (default: the model's own)")
    add("--negative-prompt", default="", help="what to steer away from")
    add("--num", type=int, default=8, help="images a prompt (default %(default)s)")
    add("--seed", type=int, default=0, help="of the noise (default %(default)s)")
    add(
        "--guidance",
        type=float,
        default=7.5,
        help="scale, at least 1 (default %(default)s)",
    )
    add("--steps", type=int, default=25, help="denoising steps (default %(default)s)")
    names = schedules.SCHEDULERS
    add("--scheduler", choices=names, default="", help="default: the model's own")
    add("--grid", action=argparse.BooleanOptionalAction, default=True)
    add(
        "--batch-size", type=int, default=8, help="images at once (default %(default)s)"
    )
    dtypes = tuple(DTYPES)
    add("--dtype", choices=dtypes, default="float32", help="of weights and arithmetic")
    return parser


def _check(args):
    for name in ("num", "steps", "batch_size"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}={getattr(args, name)} must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed={args.seed} must be from 0 to {2**32 - 1}")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"--out={args.out!r} is a file; must be a folder")


def _write(out, args, images, settings):
    for p, row in enumerate(images):
        for n, image in enumerate(row):
            with files.atomic_write(out / f"{p:03d}-{n:03d}.png") as aside:
                Image.fromarray(image).save(aside)
    if args.grid:
        grid.save_grid(list(images), out / "grid.png", row_labels=args.prompt)
    text = json.dumps(settings, indent=2) + "\n"
    files.write(out / "generate.json", text)


def _draw(model, args) -> np.ndarray:
    """Returns uint8 "P N H W 3": every prompt starts from the same noises."""
    total = len(args.prompt) * args.num
    logging.info("drawing %d images; the first batch compiles", total)
    samples = argparse.Namespace(**vars(args), batch=args.batch_size)
    with progress.bar("generate", total) as bar:
        images = draw_images(
            model,
            [prompt for prompt in args.prompt for _ in range(args.num)],
            samples,
            numbers=np.tile(np.arange(args.num), len(args.prompt)),
            negative_prompt=args.negative_prompt,
            on_batch=bar.update,
        )
    return images.reshape(len(args.prompt), args.num, *images.shape[1:])


def main(argv=None) -> int:
    """Runs the command line; returns the exit code.

    Raises: UserError for a mistake in the flags or the model folder.
    """
    args = _parser().parse_args(argv)
    _check(args)
    sharding.make_default_mesh(cpu_devices_to_draw(args.model))
    model = load_model(
        args.model,
        args.dtype,
        revision=args.revision,
        variant=args.variant,
        resolution=args.resolution,
        added=AdapterFiles(
            tuple(args.unet_tensors), tuple(args.lora), tuple(args.textual_inversion)
        ),
    )
    schedules.schedule(model.scheduler_config, args.scheduler, args.steps)  # checks
    start = time.monotonic()
    images = _draw(model, args)
    config = model.scheduler_config
    settings = vars(args) | {
        "model_sha256": model.folder.content_hash(),
        "scheduler": args.scheduler or schedules.default_scheduler(config),
        "scheduler_config": config,
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.monotonic() - start, 2),
    }
    _write(Path(args.out), args, images, settings)
    logging.info("wrote %d images to %s", len(args.prompt) * args.num, args.out)
    return 0


if __name__ == "__main__":
    cli.run_main(lambda: main(sys.argv[1:]))
