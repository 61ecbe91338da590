# SPDX-License-Identifier: Apache-2.0
"""How good is emoji-sd? Every thing it knows in six styles, judged; the VAE; the judge.

    python perf/emoji_sd_quality.py --out docs/emoji_sd

Writes quality.json and grid.png (48 random prompts, uncurated). Options name another
model or judge folder, e.g. of a pretraining run.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gift_jax.data import augment, captions
from gift_jax.data.sources import emoji
from gift_jax.metrics import judge
from gift_jax.models.load import load_model
from gift_jax.models.sd import stable_diffusion
from gift_jax.runtime import cli, files
from gift_jax.sampling import grid
from gift_jax.sampling.images import draw_images
from gift_jax.training import sharding


def sample_quality(model, seen, args, out: pathlib.Path) -> dict:
    """Returns the judge's top-1 of thing and style over all known pairs."""
    pairs = [(c, s) for c in emoji.known_concepts() for s in emoji.STYLES]
    if args.limit:
        pairs = pairs[:: max(1, len(pairs) // args.limit)]
    sampler = ConfigDict(
        {"seed": args.seed, "guidance": args.guidance, "steps": args.steps, "batch": 64}
    )
    prompts = [captions.caption(*pair) for pair in pairs]
    images = draw_images(model, model.params["unet"], prompts, sampler)
    concept, style = seen.name(images)
    right = concept == [seen.concepts.index(c) for c, _ in pairs]
    right_style = style == [seen.styles.index(s) for _, s in pairs]
    chosen = np.random.default_rng(args.seed).permutation(len(pairs))[:48]
    rows = images[chosen].reshape(-1, 8, *images.shape[1:])
    grid.save_grid(list(rows), out / "grid.png")
    names = [pairs[i] for i in chosen]
    (out / "grid.txt").write_text(
        "\n".join(
            f"{i // 8 + 1},{i % 8 + 1}: {s} {c}" for i, (c, s) in enumerate(names)
        )
    )
    return {
        "samples": len(pairs),
        "thing_top1": float(np.mean(right)),
        "style_top1": float(np.mean(right_style)),
        "thing_top1_by_style": {
            s: float(np.mean(right[[p[1] == s for p in pairs]])) for s in emoji.STYLES
        },
    }


def vae_quality(model, pictures) -> dict:
    """Returns the reconstruction's PSNR in dB over every picture, posterior mean."""
    errors = []
    for first in range(0, len(pictures.images), 96):
        x_BHWC = pictures.images[first : first + 96].astype(np.float32) / 127.5 - 1.0
        mean, _ = stable_diffusion.encode_images(model, x_BHWC, 96)
        out = np.clip(stable_diffusion.decode_latents(model, mean, 96), -1.0, 1.0)
        errors.append(np.mean(np.square(out - x_BHWC), axis=(1, 2, 3)))
    error = np.concatenate(errors)
    psnr = 10.0 * np.log10(4.0 / error)
    return {
        "mean_of_pictures_db": float(np.mean(psnr)),
        "of_mean_error_db": float(10.0 * np.log10(4.0 / np.mean(error))),
        "held_out_mean_db": float(np.mean(psnr[pictures.held_out])),
    }


def judge_quality(seen, pictures) -> dict:
    """Returns the judge's accuracy on real pictures: its ceiling."""
    float_images = jnp.asarray(pictures.images, jnp.float32) / 127.5 - 1.0
    may = np.asarray([captions.may_flip(c) for c in pictures.concepts])
    may = jnp.asarray(may[pictures.concept_ids])

    def changed(flip, shift):
        key = jax.random.key(7)
        out = augment.augment(key, float_images, may, flip=flip, shift=shift, scale=0.0)
        return np.asarray((out + 1.0) * 127.5 + 0.5).clip(0, 255).astype(np.uint8)

    versions = {
        "as_they_are": pictures.images,
        "flipped": changed(1.0, 0),
        "shifted": changed(0.0, 4),
    }
    report = {}
    for name, images in versions.items():
        concept, style = seen.name(images)
        right = concept == pictures.concept_ids
        right_style = style == pictures.style_ids
        for part, rows in (
            ("seen", ~pictures.held_out),
            ("held_out", pictures.held_out),
        ):
            report[f"{name}_{part}"] = {
                "thing_top1": float(np.mean(right[rows])),
                "style_top1": float(np.mean(right_style[rows])),
            }
    return report


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--model", default="emoji-sd")
    flags.add_argument("--judge", default="embedded", help="folder (default: embedded)")
    flags.add_argument("--out", required=True, type=pathlib.Path)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--guidance", type=float, default=3.0)
    flags.add_argument("--steps", type=int, default=25)
    flags.add_argument("--limit", type=int, default=0, help="fewer samples; 0: all")
    args = flags.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sharding.make_default_mesh()
    embedded = args.judge == "embedded"
    seen = judge.load(judge.FOLDER if embedded else pathlib.Path(args.judge))
    pictures = emoji.load()
    model = load_model(args.model)
    result = {
        "settings": {k: str(v) for k, v in vars(args).items()},
        "judge": seen.version,
        "judge_on_real_pictures": judge_quality(seen, pictures),
        "vae": vae_quality(model, pictures),
        "samples": sample_quality(model, seen, args, args.out),
    }
    files.write_json(args.out / "quality.json", result)
    print((args.out / "quality.json").read_text())
    return 0


if __name__ == "__main__":
    cli.run_main(main)
