# SPDX-License-Identifier: Apache-2.0
"""Makes emoji-sd, the Stable Diffusion in miniature that ships with the package.

    python -m gift_jax.pretrain --config configs/emoji_pretrain.py --workdir RUN

Hardware: two CPU cores. Cost and result: docs/lab/emoji_sd.md. Every constant is ours.
"""

from ml_collections import ConfigDict

from gift_jax.runtime.config import with_variant


def get_config(name: str = "") -> ConfigDict:
    c = ConfigDict()
    c.kind = "pretrain"  # the command that it is for
    c.seed = 0
    c.cpu_devices = 2  # to make of a machine without accelerator
    c.log_every = 50  # steps
    c.checkpoint_every = 250  # steps

    c.clip = ConfigDict()
    c.clip.steps = 3000
    c.clip.batch = 64  # images a step
    c.clip.lr = 1e-3  # AdamW's peak, after a warm-up over 5% of the steps, then cosine
    c.clip.weight_decay = 0.05
    c.clip.ema = 0.995  # decay of the averaged weights, the ones that ship
    c.clip.tokens = 32  # prompt length
    c.clip.text_width = 128
    c.clip.text_layers = 3
    c.clip.heads = 4
    c.clip.image_channels = (32, 64, 128, 256)
    c.clip.embedding = 128
    c.clip.caption_odds = (0.8, 0.14, 0.06)  # names both, concept only, style only
    c.clip.flip = 0.5  # probability, where sensible
    c.clip.shift = 4  # pixels
    c.clip.scale = 0.1  # fraction

    c.vae = ConfigDict()
    c.vae.steps = 1800
    c.vae.batch = 24
    c.vae.lr = 1e-3
    c.vae.weight_decay = 0.0
    c.vae.ema = 0.99
    c.vae.channels = (32, 32, 64, 128)
    c.vae.layers = 1
    c.vae.latent_channels = 8
    c.vae.squared = 2.0  # weight of the squared error beside L1
    c.vae.kl = 1e-3  # weight of the mean KL a latent number
    c.vae.flip = 0.5
    c.vae.shift = 4
    c.vae.scale = 0.1

    c.decoder = ConfigDict()  # the VAE's decoder, trained on with the encoder frozen
    c.decoder.steps = 600
    c.decoder.batch = 24
    c.decoder.lr = 1e-3
    c.decoder.weight_decay = 0.0
    c.decoder.ema = 0.99
    c.decoder.squared = 4.0
    c.decoder.flip = 0.5
    c.decoder.shift = 4
    c.decoder.scale = 0.1

    c.unet = ConfigDict()
    c.unet.steps = 6000
    c.unet.batch = 64
    c.unet.lr = 1e-3
    c.unet.weight_decay = 0.01
    c.unet.ema = 0.999
    c.unet.channels = (64, 128, 192)
    c.unet.layers = 1
    c.unet.heads = 4
    c.unet.variants = 8  # cached versions of each image
    c.unet.prompt_dropout = 0.1  # probability, for classifier-free guidance
    c.unet.shift = 2
    c.unet.scale = 0.05

    c.quality = ConfigDict()  # of the result, measured at the end
    c.quality.seed = 0
    c.quality.guidance = 3.0
    c.quality.steps = 25
    c.quality.limit = 0  # samples; 0: every known concept in every style

    smoke = {f"{stage}.steps": 2 for stage in ("clip", "vae", "unet", "decoder")}
    smoke |= {f"{stage}.batch": 8 for stage in ("clip", "vae", "unet", "decoder")}
    smoke |= {
        "cpu_devices": 1,
        "clip.text_width": 32,
        "clip.text_layers": 1,
        "clip.image_channels": (8, 8, 8),
        "clip.embedding": 32,
        "vae.channels": (32, 32, 32, 32),
        "unet.channels": (32, 64),
        "unet.variants": 2,
        "quality.steps": 2,
        "quality.limit": 4,
    }
    return with_variant(c, name, smoke=smoke)
