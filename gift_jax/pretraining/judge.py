# SPDX-License-Identifier: Apache-2.0
"""The judge: CLIP's image tower trained on against its locked text tower.

Contrast within a batch teaches the two towers to meet; telling 480 things apart takes
all 480 names at once. The text tower is frozen (as in LiT, Zhai et al. 2022,
arXiv:2111.07991), so every name is a constant vector and each picture is compared with
all of them.
"""

import jax
import jax.numpy as jnp
import optax

from gift_jax import loop
from gift_jax.data import augment
from gift_jax.models import hooks

TRAINED = ("vision_model", "visual_projection")


def make_step(clip, tx: optax.GradientTransformation, cfg) -> loop.Step:
    """Returns the step: cross entropy over all concepts plus that over all styles.

    state.params: the image tower. frozen: {"clip": the rest of CLIP's parameters,
    "concept": "N D", "style": "S D"}.
    """

    def loss_fn(params, frozen, images_BHWC, concept_B, style_B):
        x_BCHW = jnp.transpose(images_BHWC, (0, 3, 1, 2))
        x_BD = hooks.apply_clip_image(clip, {**frozen["clip"], **params}, x_BCHW)
        x_BD = x_BD / jnp.linalg.norm(x_BD, axis=-1, keepdims=True)
        logits_BN = cfg.logit_scale * x_BD @ frozen["concept"].T
        logits_BS = cfg.logit_scale * x_BD @ frozen["style"].T
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        loss = jnp.mean(cross_entropy(logits_BN, concept_B))
        loss += cfg.style_weight * jnp.mean(cross_entropy(logits_BS, style_B))
        right = jnp.mean(jnp.argmax(logits_BN, axis=1) == concept_B)
        right_style = jnp.mean(jnp.argmax(logits_BS, axis=1) == style_B)
        return loss, {"judge/accuracy": right, "judge/style_accuracy": right_style}

    def step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        batch = batch["train"]
        images = augment.augment(
            key,
            batch["image"].astype(jnp.float32) / 127.5 - 1.0,
            batch["may_flip"],
            flip=cfg.flip,
            shift=cfg.shift,
            scale=cfg.scale,
        )
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, metrics), grads = grad_fn(
            state.params, frozen, images, batch["concept"], batch["style"]
        )
        updates, opt = tx.update(grads, state.opt["judge"], state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1.0 - cfg.ema)
        state = state.replace(
            step=state.step + 1, params=params, opt={"judge": opt}, ema=ema
        )
        return state, {"judge/loss": loss, **metrics}

    return step
