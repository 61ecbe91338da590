# SPDX-License-Identifier: Apache-2.0
"""The small UNet, trained on cached latents and text states."""

import jax
import jax.numpy as jnp
import numpy as np

from gift_jax.data import augment, captions
from gift_jax.data.sources.emoji import known_concepts
from gift_jax.diffusion import add_noise, normal_like, squared_error, timesteps
from gift_jax.models import sd
from gift_jax.models.batching import map_batches
from gift_jax.models.sd import architectures
from gift_jax.state import Loss

_BATCH = 64  # images encoded at once
SCHEDULER = architectures.SCHEDULER | {
    "_class_name": "DDIMScheduler",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
}


def model_config(cfg, latent_channels: int, latent_size: int, text_width: int) -> dict:
    """Returns UNet2DConditionModel's config.json for the sizes in cfg.unet."""
    return architectures.unet_config(
        cfg.channels,
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        layers_per_block=cfg.layers,
        attention_head_dim=cfg.heads,  # SD 1.x's name for the number of heads
        cross_attention_dim=text_width,
        use_linear_projection=False,
    )


def known_rows(emoji) -> np.ndarray:
    """Returns int "N": the images of what is known, less those that are held out."""
    is_known = np.asarray([name in known_concepts() for name in emoji.concepts])
    return np.flatnonzero(is_known[emoji.concept_ids] & ~emoji.held_out)


def captions_of(emoji, rows) -> list[list[str]]:
    """Returns the captions of every row, in every template: V lists of N."""
    names = [
        (emoji.concepts[emoji.concept_ids[row]], emoji.styles[emoji.style_ids[row]])
        for row in rows
    ]
    return [
        [captions.fill(template, *name) for name in names]
        for template in captions.TEMPLATES
    ]


def augmented_latents(key, encode, emoji, rows, cfg) -> dict[str, np.ndarray]:
    """Returns posterior mean and std of every row, in cfg.variants versions.

    Version 0 is the image itself; the others are shifted and scaled a little.

    Args: encode: images "B H W 3" in [-1, 1] -> (mean, std) "B C h w".
    Returns: mean, std: float32 "N V C h w".
    """

    def encode_original(arrays):
        return encode(arrays["image"].astype(jnp.float32) / 127.5 - 1.0)

    def encode_moved(arrays, key):
        x_BHWC = arrays["image"].astype(jnp.float32) / 127.5 - 1.0
        never_B = jnp.zeros(len(x_BHWC), bool)
        moved_BHWC = augment.augment(
            key,
            x_BHWC,
            never_B,
            flip=0.0,
            shift=cfg.shift,
            scale=cfg.scale,
            index_B=arrays["index"],
        )
        return encode(moved_BHWC)

    encode_original, encode_moved = jax.jit(encode_original), jax.jit(encode_moved)
    arrays = {"image": emoji.images[rows], "index": np.arange(len(rows))}
    versions = [map_batches(encode_original, arrays, _BATCH)]
    for variant in range(1, cfg.variants):
        k_variant = jax.random.fold_in(key, variant)
        versions.append(
            map_batches(lambda a, k=k_variant: encode_moved(a, k), arrays, _BATCH)
        )
    means, stds = zip(*versions, strict=True)
    return {"mean": np.stack(means, 1), "std": np.stack(stds, 1)}


def make_loss(unet, cfg) -> Loss:
    """Returns the denoising loss (epsilon prediction, Ho et al. 2020, eq. 14).

    frozen: text: float32 "V N L D", the text states of the N captions known, in V
      templates; empty: float32 "L D", those of ""; abar: float32 "T".
    batch: mean, std: "B V C h w"; caption: int32 "B".
    """

    def loss_fn(params, frozen, batch, key):
        k_pick, k_z, k_eps, k_t, k_drop = jax.random.split(key, 5)
        B = batch["caption"].shape[0]
        k_template, k_variant = jax.random.split(k_pick)
        template = jax.random.randint(k_template, (B,), 0, frozen["text"].shape[0])
        variant = jax.random.randint(k_variant, (B,), 0, cfg.variants)
        mean = batch["mean"][jnp.arange(B), variant]
        std = batch["std"][jnp.arange(B), variant]
        z = mean + std * normal_like(k_z, mean)
        eps = normal_like(k_eps, z)
        t = timesteps(k_t, B, frozen["abar"].shape[0])
        c = frozen["text"][template, batch["caption"]]
        drop = jax.random.uniform(k_drop, (B, 1, 1)) < cfg.prompt_dropout
        c = jnp.where(drop, frozen["empty"][None], c)
        z_t = add_noise(z, eps, frozen["abar"][t])
        out, _ = sd.apply_unet(unet, params, z_t, t, c)
        return jnp.mean(squared_error(out, eps)), {}

    return loss_fn
