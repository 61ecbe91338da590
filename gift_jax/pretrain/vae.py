# SPDX-License-Identifier: Apache-2.0
"""The small VAE: 64x64 images to 8x8 latents and back."""

import jax
import jax.numpy as jnp

from gift_jax.diffusion import normal_like
from gift_jax.models import sd
from gift_jax.models.sd import architectures
from gift_jax.pretrain.step import augmented
from gift_jax.state import Loss


def model_config(cfg) -> dict:
    """Returns AutoencoderKL's config.json for the sizes in cfg.vae."""
    return architectures.vae_config(
        cfg.channels,
        layers_per_block=cfg.layers,
        latent_channels=cfg.latent_channels,
        sample_size=64,
        scaling_factor=1.0,  # set once trained: 1 / std of the latents
    )


def make_loss(vae, cfg) -> Loss:
    """Returns the training loss: L1 + weighted squared error + weighted KL."""

    def loss_fn(params, frozen, batch, key):
        del frozen
        k_augment, k_posterior = jax.random.split(key)
        x_BCHW = _augmented(k_augment, batch, cfg)
        mean, logvar = sd.apply_vae_encode(vae, params, x_BCHW)
        z = mean + jnp.exp(0.5 * logvar) * normal_like(k_posterior, mean)
        error = sd.apply_vae_decode(vae, params, z) - x_BCHW
        l1, l2 = jnp.mean(jnp.abs(error)), jnp.mean(jnp.square(error))
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
        loss = l1 + cfg.squared * l2 + cfg.kl * kl
        return loss, {"vae/l1": l1, "vae/kl": kl, "vae/psnr_db": psnr(l2)}

    return loss_fn


def make_decoder_loss(vae, cfg) -> Loss:
    """Returns the loss of the decoder alone, the latents staying what they are.

    So a UNet trained on them stays valid, as with Stable Diffusion's own ft-MSE
    decoders. The parameters are decoder and post_quant_conv; frozen: {"encoder": the
    rest}.
    """

    def loss_fn(params, frozen, batch, key):
        k_augment, k_posterior = jax.random.split(key)
        x_BCHW = _augmented(k_augment, batch, cfg)
        params = {**frozen["encoder"], **params}
        mean, logvar = sd.apply_vae_encode(vae, params, x_BCHW)
        z = mean + jnp.exp(0.5 * logvar) * normal_like(k_posterior, mean)
        error = sd.apply_vae_decode(vae, params, jax.lax.stop_gradient(z)) - x_BCHW
        l1, l2 = jnp.mean(jnp.abs(error)), jnp.mean(jnp.square(error))
        metrics = {"decoder/l1": l1, "decoder/psnr_db": psnr(l2)}
        return l1 + cfg.squared * l2, metrics

    return loss_fn


def _augmented(key, batch, cfg):
    return jnp.transpose(augmented(key, batch, cfg), (0, 3, 1, 2))


def psnr(squared_error):
    """Returns peak signal-to-noise ratio in dB; squared error of images in [-1, 1]."""
    return 10.0 * jnp.log10(4.0 / squared_error)
