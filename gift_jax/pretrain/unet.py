# SPDX-License-Identifier: Apache-2.0
"""The small UNet, trained on cached latents and text states, with averaged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gift_jax.data import augment
from gift_jax.diffusion import add_noise, normal_like, squared_error, timesteps
from gift_jax.models import sd
from gift_jax.state import Step, global_norm

TRAIN_TIMESTEPS = 1000


def model_config(cfg, latent_channels: int, latent_size: int, text_width: int) -> dict:
    """Returns UNet2DConditionModel's config.json for the sizes in cfg.unet."""
    crossed = len(cfg.channels) - 1
    down = ["CrossAttnDownBlock2D"] * crossed + ["DownBlock2D"]
    up = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * crossed
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": latent_size,
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "block_out_channels": list(cfg.channels),
        "down_block_types": down,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": up,
        "layers_per_block": cfg.layers,
        "attention_head_dim": cfg.heads,  # SD 1.x's name for the number of heads
        "cross_attention_dim": text_width,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "use_linear_projection": False,
    }


def scheduler_config() -> dict:
    """Returns SD 1.5's noise schedule as a DDIM scheduler_config.json."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": TRAIN_TIMESTEPS,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "trained_betas": None,
    }


def alphas_cumprod() -> np.ndarray:
    """Returns float32 "T" of `scheduler_config` (Rombach et al. 2022's schedule)."""
    c = scheduler_config()
    betas = np.linspace(c["beta_start"] ** 0.5, c["beta_end"] ** 0.5, TRAIN_TIMESTEPS)
    return np.cumprod(1.0 - betas**2).astype(np.float32)


def augmented_latents(key, encode, emoji, rows, cfg) -> dict[str, np.ndarray]:
    """Returns posterior mean and std of every row, in cfg.variants versions.

    Version 0 is the picture itself; the others are shifted and scaled a little.

    Args: encode: images "B H W 3" in [-1, 1] -> (mean, std) "B C h w".
    Returns: mean, std: float32 "N V C h w".
    """
    size = 64

    def moved(key, x_BHWC):
        never = jnp.zeros(size, bool)
        x_BHWC = augment.augment(
            key, x_BHWC, never, flip=0.0, shift=cfg.shift, scale=cfg.scale
        )
        return encode(x_BHWC)

    encode_as_is, encode_moved = jax.jit(encode), jax.jit(moved)
    mean, std = [], []
    for variant in range(cfg.variants):
        chunks = []
        for first in range(0, len(rows), size):
            some = np.resize(rows[first : first + size], size)
            x = jnp.asarray(emoji.images[some], jnp.float32) / 127.5 - 1.0
            if variant:
                k = jax.random.fold_in(jax.random.fold_in(key, variant), first)
                latents = encode_moved(k, x)
            else:
                latents = encode_as_is(x)
            chunks.append(jax.device_get(latents))
        mean.append(np.concatenate([c[0] for c in chunks])[: len(rows)])
        std.append(np.concatenate([c[1] for c in chunks])[: len(rows)])
    return {"mean": np.stack(mean, 1), "std": np.stack(std, 1)}


def make_step(unet, tx: optax.GradientTransformation, cfg) -> Step:
    """Returns the denoising step (epsilon prediction, Ho et al. 2020, eq. 14).

    frozen: text: float32 "V N L D", the text states of the N captions known, in V
      templates; empty: float32 "L D", those of ""; abar: float32 "T".
    batch: mean, std: "B V C h w"; caption: int32 "B".
    """

    def loss_fn(params, z_t, t_B, c_BLD, eps):
        out, _ = sd.apply_unet(unet, params, z_t, t_B, c_BLD)
        return jnp.mean(squared_error(out, eps))

    def step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        k_pick, k_z, k_eps, k_t, k_drop = jax.random.split(key, 5)
        batch = batch["train"]
        B = batch["caption"].shape[0]
        k_template, k_variant = jax.random.split(k_pick)
        template = jax.random.randint(k_template, (B,), 0, frozen["text"].shape[0])
        variant = jax.random.randint(k_variant, (B,), 0, cfg.variants)
        mean = batch["mean"][jnp.arange(B), variant]
        std = batch["std"][jnp.arange(B), variant]
        z = mean + std * normal_like(k_z, mean)
        eps = normal_like(k_eps, z)
        t = timesteps(k_t, B, TRAIN_TIMESTEPS)
        c = frozen["text"][template, batch["caption"]]
        drop = jax.random.uniform(k_drop, (B, 1, 1)) < cfg.prompt_dropout
        c = jnp.where(drop, frozen["empty"][None], c)
        z_t = add_noise(z, eps, frozen["abar"][t])
        loss, grads = jax.value_and_grad(loss_fn)(state.params, z_t, t, c, eps)
        updates, opt = tx.update(grads, state.opt["unet"], state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(cfg.ema, (1.0 + state.step) / (10.0 + state.step))
        ema = optax.incremental_update(params, state.ema, 1.0 - decay)
        state = state.replace(
            step=state.step + 1, params=params, opt={"unet": opt}, ema=ema
        )
        return state, {"unet/loss": loss, "unet/grad_norm": global_norm(grads)}

    return step
