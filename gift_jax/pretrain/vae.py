# SPDX-License-Identifier: Apache-2.0
"""The small VAE: 64x64 pictures to 8x8 latents and back."""

import jax
import jax.numpy as jnp
import optax

from gift_jax.data import augment
from gift_jax.diffusion import normal_like
from gift_jax.models import sd
from gift_jax.state import Step


def model_config(cfg) -> dict:
    """Returns AutoencoderKL's config.json for the sizes in cfg.vae."""
    levels = len(cfg.channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": list(cfg.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": cfg.layers,
        "latent_channels": cfg.latent_channels,
        "norm_num_groups": 32,
        "act_fn": "silu",
        "sample_size": 64,
        "scaling_factor": 1.0,  # set once trained: 1 / std of the latents
    }


def make_step(vae, tx: optax.GradientTransformation, cfg) -> Step:
    """Returns the training step: L1 + weighted squared error + weighted KL."""

    def loss_fn(params, x_BCHW, key):
        mean, logvar = sd.apply_vae_encode(vae, params, x_BCHW)
        z = mean + jnp.exp(0.5 * logvar) * normal_like(key, mean)
        error = sd.apply_vae_decode(vae, params, z) - x_BCHW
        l1, l2 = jnp.mean(jnp.abs(error)), jnp.mean(jnp.square(error))
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
        loss = l1 + cfg.squared * l2 + cfg.kl * kl
        return loss, {"vae/l1": l1, "vae/kl": kl, "vae/psnr_db": psnr(l2)}

    def step(state, frozen, batch, key):
        del frozen
        key = jax.random.fold_in(key, state.step)
        k_augment, k_posterior = jax.random.split(key)
        x_BHWC = _augmented(k_augment, batch["train"], cfg)
        x_BCHW = jnp.transpose(x_BHWC, (0, 3, 1, 2))
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, metrics), grads = grad_fn(state.params, x_BCHW, k_posterior)
        updates, opt = tx.update(grads, state.opt["vae"], state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1.0 - cfg.ema)
        state = state.replace(
            step=state.step + 1, params=params, opt={"vae": opt}, ema=ema
        )
        return state, {"vae/loss": loss, **metrics}

    return step


def make_decoder_step(vae, tx: optax.GradientTransformation, cfg) -> Step:
    """Returns a step that trains the decoder alone, the latents staying what they are.

    So a UNet trained on them stays valid, as with Stable Diffusion's own ft-MSE
    decoders. state.params: decoder and post_quant_conv; frozen: {"encoder": the rest}.
    """

    def loss_fn(params, frozen, x_BCHW, key):
        every = {**frozen["encoder"], **params}
        mean, logvar = sd.apply_vae_encode(vae, every, x_BCHW)
        z = mean + jnp.exp(0.5 * logvar) * normal_like(key, mean)
        z = jax.lax.stop_gradient(z)
        error = sd.apply_vae_decode(vae, every, z) - x_BCHW
        l1, l2 = jnp.mean(jnp.abs(error)), jnp.mean(jnp.square(error))
        metrics = {"decoder/l1": l1, "decoder/psnr_db": psnr(l2)}
        return l1 + cfg.squared * l2, metrics

    def step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        k_augment, k_posterior = jax.random.split(key)
        x_BHWC = _augmented(k_augment, batch["train"], cfg)
        x_BCHW = jnp.transpose(x_BHWC, (0, 3, 1, 2))
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, metrics), grads = grad_fn(state.params, frozen, x_BCHW, k_posterior)
        updates, opt = tx.update(grads, state.opt["decoder"], state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1.0 - cfg.ema)
        state = state.replace(
            step=state.step + 1, params=params, opt={"decoder": opt}, ema=ema
        )
        return state, {"decoder/loss": loss, **metrics}

    return step


def _augmented(key, batch, cfg):
    return augment.augment(
        key,
        batch["image"].astype(jnp.float32) / 127.5 - 1.0,
        batch["may_flip"],
        flip=cfg.flip,
        shift=cfg.shift,
        scale=cfg.scale,
    )


def psnr(squared_error):
    """Returns peak signal-to-noise ratio in dB; squared error of images in [-1, 1]."""
    return 10.0 * jnp.log10(4.0 / squared_error)
