# SPDX-License-Identifier: Apache-2.0
"""How good is emoji-sd? All that it knows in six styles, judged; the VAE; the judge.

    python -m gift_jax.pretrain.quality --out docs/emoji_sd
    python -m gift_jax.pretrain.quality --model emoji-flow --out docs/emoji_flow

The last stage of gift_jax.pretrain; writes quality.json and grid.png (48 random
prompts, uncurated). Options name another model or judge folder.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gift_jax.data import augment, captions
from gift_jax.data.sources import emoji
from gift_jax.metrics import judge as judges
from gift_jax.models.load import EMBEDDED, load_model
from gift_jax.runtime import cli, files
from gift_jax.sampling import grid
from gift_jax.sampling.images import Samples, draw_images
from gift_jax.training import sharding

_GRID = 48  # images
_BATCH = 96  # images of the VAE at once


def measure(model_folder, judge_folder, out: pathlib.Path, settings: Any) -> dict:
    """Writes quality.json and grid.png into `out`; returns what quality.json says.

    Args: settings: seed, guidance, steps (of the sampler) and limit (fewer samples; 0:
      all).
    """
    out.mkdir(parents=True, exist_ok=True)
    judge, data = judges.load(judge_folder), emoji.load()
    model = load_model(str(model_folder))
    names = "seed", "guidance", "steps", "limit"
    result = {
        "settings": {name: getattr(settings, name) for name in names},
        "judge": judge.version,
        "judge_on_real_images": judge_quality(judge, data),
        "vae": vae_quality(model, data),
        "samples": sample_quality(model, judge, settings, out),
    }
    files.write_json(out / "quality.json", result)
    return result


def sample_quality(model, judge, settings, out: pathlib.Path) -> dict:
    """Returns the judge's top-1 of concept and style over all known pairs."""
    pairs = [(c, s) for c in emoji.known_concepts() for s in emoji.STYLES]
    if settings.limit:
        pairs = pairs[:: max(1, len(pairs) // settings.limit)]
    samples = Samples(
        seed=settings.seed,
        guidance=settings.guidance,
        steps=settings.steps,
        batch=64,
    )
    prompts = [captions.caption(*pair) for pair in pairs]
    images = draw_images(model, prompts, samples)
    concept, style = judge.name(images)
    is_concept = concept == [judge.concepts.index(c) for c, _ in pairs]
    is_style = style == [judge.styles.index(s) for _, s in pairs]
    _save_grid(pairs, images, settings.seed, out)
    by_style = {
        name: float(np.mean(is_concept[[style == name for _, style in pairs]]))
        for name in emoji.STYLES
        if any(style == name for _, style in pairs)
    }
    return {
        "samples": len(pairs),
        "concept_top1": float(np.mean(is_concept)),
        "style_top1": float(np.mean(is_style)),
        "concept_top1_by_style": by_style,
    }


def _save_grid(pairs, images, seed: int, out: pathlib.Path) -> None:
    rows = np.random.default_rng(seed).permutation(len(pairs))[:_GRID]
    grid.save_grid(images[rows], out / "grid.png")
    places = (f"{i // 8 + 1},{i % 8 + 1}" for i in range(len(rows)))
    names = (f"{style} {concept}" for concept, style in (pairs[row] for row in rows))
    lines = (f"{place}: {name}" for place, name in zip(places, names, strict=True))
    (out / "grid.txt").write_text("\n".join(lines))


def vae_quality(model, data) -> dict:
    """Returns the reconstruction's PSNR in dB over every image, posterior mean."""
    errors = []
    for first in range(0, len(data.images), _BATCH):
        images = data.images[first : first + _BATCH]
        x_BHWC = images.astype(np.float32) / 127.5 - 1.0
        mean, _ = model.encode_images(x_BHWC, _BATCH)
        decoded = np.asarray(model.decode(mean, _BATCH))
        squares = np.square(np.clip(decoded, -1.0, 1.0) - x_BHWC)
        errors.append(np.mean(squares, axis=(1, 2, 3)))
    error = np.concatenate(errors)
    psnr = 10.0 * np.log10(4.0 / error)
    return {
        "mean_of_images_db": float(np.mean(psnr)),
        "of_mean_error_db": float(10.0 * np.log10(4.0 / np.mean(error))),
        "held_out_mean_db": float(np.mean(psnr[data.held_out])),
    }


def judge_quality(judge, data) -> dict:
    """Returns the judge's accuracy on real images, its ceiling: {version: ...}."""
    versions = {
        "original": data.images,
        "flipped": _augmented(data, flip=1.0, shift=0),
        "shifted": _augmented(data, flip=0.0, shift=4),
    }
    report = {}
    for name, images in versions.items():
        concept, style = judge.name(images)
        for part, rows in (("seen", ~data.held_out), ("held_out", data.held_out)):
            report[f"{name}_{part}"] = {
                "concept_top1": float(np.mean((concept == data.concept_ids)[rows])),
                "style_top1": float(np.mean((style == data.style_ids)[rows])),
            }
    return report


def _augmented(data, flip: float, shift: int) -> np.ndarray:
    may_flip = np.asarray([captions.may_flip(name) for name in data.concepts])
    images = augment.augment(
        jax.random.key(7),
        jnp.asarray(data.images, jnp.float32) / 127.5 - 1.0,
        jnp.asarray(may_flip[data.concept_ids]),
        flip=flip,
        shift=shift,
        scale=0.0,
    )
    return np.asarray((images + 1.0) * 127.5 + 0.5).clip(0, 255).astype(np.uint8)


def main(argv: list[str] | None = None) -> int:
    flags = cli.parser(__doc__, "pretrain.quality")
    flags.add_argument("--model", default=EMBEDDED, help="(default: the embedded one)")
    flags.add_argument("--judge", default=judges.FOLDER, type=pathlib.Path)
    flags.add_argument("--out", required=True, type=pathlib.Path)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--guidance", type=float, default=3.0)
    flags.add_argument("--steps", type=int, default=25)
    flags.add_argument("--limit", type=int, default=0, help="fewer samples; 0: all")
    args = flags.parse_args(argv)
    sharding.make_default_mesh()
    measure(args.model, args.judge, args.out, args)
    print((args.out / "quality.json").read_text())
    return 0


if __name__ == "__main__":
    cli.run_main(main)
