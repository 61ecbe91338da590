# SPDX-License-Identifier: Apache-2.0
"""Draw pictures with a Stable Diffusion model folder.

Writes one PNG a picture (prompt number, picture number), grid.png with a row a prompt,
and generate.json with everything needed to draw the same again. A picture depends on
the seed and its own number only: not on --num, --batch-size or the machine's devices.

example:
  python -m gift_jax.generate --prompt "a dog, flat style" --num 8 --out pictures
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from absl import logging
from PIL import Image

from gift_jax.models import weights
from gift_jax.models.load import DTYPES, cpu_devices_to_draw, load_model
from gift_jax.models.sd import stable_diffusion
from gift_jax.runtime import cli, files, progress
from gift_jax.runtime.errors import UserError
from gift_jax.sampling import grid, sampler, schedules
from gift_jax.training import sharding


def _parser():
    import argparse

    p = cli.parser(__doc__, "generate")
    p.add_argument(
        "--model",
        default="emoji-sd",
        help="a diffusers folder or hub id (default: emoji-sd, the embedded one)",
    )
    p.add_argument("--revision", default="", help="of a hub id: branch, tag or commit")
    p.add_argument("--variant", default="", help="of the weight files, such as fp16")
    p.add_argument(
        "--resolution", type=int, default=0, help="pixels (default: the model's own)"
    )
    p.add_argument(
        "--prompt", action="append", required=True, help="what to draw; repeatable"
    )
    p.add_argument("--negative-prompt", default="", help="what to steer away from")
    p.add_argument("--num", type=int, default=8, help="pictures a prompt (default 8)")
    p.add_argument("--seed", type=int, default=0, help="(default 0)")
    p.add_argument("--guidance", type=float, default=7.5, help=">= 1 (default 7.5)")
    p.add_argument("--steps", type=int, default=25, help="denoising steps (default 25)")
    p.add_argument(
        "--scheduler",
        choices=schedules.SCHEDULERS,
        help="(default: the model's own, or ddim)",
    )
    p.add_argument("--out", required=True, help="folder to write to")
    p.add_argument("--grid", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument(
        "--batch-size", type=int, default=8, help="pictures at once (default 8)"
    )
    p.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="float32",
        help="of weights and computation (default float32)",
    )
    return p


def _check(args):
    for name in ("num", "steps", "batch_size"):
        if getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}={getattr(args, name)} must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed={args.seed} must be from 0 to {2**32 - 1}")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"--out={args.out!r} is a file; must be a folder")


def draw(model, prompts, num, *, key, negative_prompt="", batch_size=8, **how):
    """Returns uint8 "P N H W 3": `num` pictures of each prompt.

    Args: model: a StableDiffusion. key: every prompt starts from the same noises,
      number i of which depends on the key and i alone. how: scheduler, steps, guidance
      and on_batch, see `sampling.draw`.
    """
    cond_PLD = np.asarray(stable_diffusion.encode_prompts(model, prompts))
    images = sampler.draw(
        model,
        model.params["unet"],
        np.repeat(cond_PLD, num, axis=0),
        stable_diffusion.encode_prompts(model, [negative_prompt]),
        key,
        np.tile(np.arange(num), len(prompts)),
        batch_size,
        **how,
    )
    return images.reshape(len(prompts), num, *images.shape[1:])


def _write(out, args, images, settings):
    for p, row in enumerate(images):
        for n, image in enumerate(row):
            with files.atomic_write(out / f"{p:03d}-{n:03d}.png") as aside:
                Image.fromarray(image).save(aside)
    if args.grid:
        grid.save_grid(list(images), out / "grid.png", row_labels=args.prompt)
    text = json.dumps(settings, indent=2) + "\n"
    files.write(out / "generate.json", text)


def main(argv=None):
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
    )
    scheduler = args.scheduler or schedules.default_scheduler(model.scheduler_config)
    total, began = len(args.prompt) * args.num, time.monotonic()
    logging.info("drawing %d pictures; the first batch compiles", total)
    with progress.bar("generate", total) as bar:
        images = draw(
            model,
            args.prompt,
            args.num,
            key=jax.random.key(args.seed),
            negative_prompt=args.negative_prompt,
            batch_size=args.batch_size,
            on_batch=bar.update,
            scheduler=scheduler,
            steps=args.steps,
            guidance=args.guidance,
        )
    settings = vars(args) | {
        "model": args.model,
        "model_sha256": weights.content_hash(model.path),
        "scheduler": scheduler,
        "scheduler_config": model.scheduler_config,
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "diffusers")
        },
        "device": jax.devices()[0].device_kind,
        "seconds": round(time.monotonic() - began, 2),
    }
    _write(Path(args.out), args, images, settings)
    logging.info("wrote %d pictures to %s", total, args.out)
    return 0


if __name__ == "__main__":
    cli.run_main(lambda: main(sys.argv[1:]))
