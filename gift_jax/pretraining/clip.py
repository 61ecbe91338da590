# SPDX-License-Identifier: Apache-2.0
"""The small CLIP: its text tower conditions emoji-sd, its image tower judges it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gift_jax import loop
from gift_jax.data import augment, captions
from gift_jax.models import hooks

BOTH, CONCEPT, STYLE = 0, 1, 2  # what a caption names


def model_config(cfg, vocabulary: int) -> dict:
    """Returns CLIPModel's config.json for the sizes in cfg.clip."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": cfg.text_width,
        "intermediate_size": 4 * cfg.text_width,
        "num_hidden_layers": cfg.text_layers,
        "num_attention_heads": cfg.heads,
        "max_position_embeddings": cfg.tokens,
        "projection_dim": cfg.embedding,
        "hidden_act": "quick_gelu",
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
        "pad_token_id": vocabulary - 1,
    }
    vision = {
        "hidden_size": cfg.image_width,
        "intermediate_size": 4 * cfg.image_width,
        "num_hidden_layers": cfg.image_layers,
        "num_attention_heads": cfg.heads,
        "image_size": 64,
        "patch_size": cfg.patch,
        "projection_dim": cfg.embedding,
        "hidden_act": "quick_gelu",
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": cfg.embedding,
        "logit_scale_init_value": 2.6592,
        "text_config": {"model_type": "clip_text_model", **text},
        "vision_config": {"model_type": "clip_vision_model", **vision},
    }


def caption_tables(tokenizer, concepts, styles, length: int) -> list[np.ndarray]:
    """Returns token ids for every caption: [both, concept only, style only].

    Each is int32 "V N S L": template variant, concept, style, tokens.
    """
    kinds = (
        [lambda c, s, t=t: captions.fill(t, c, s) for t in captions.TEMPLATES],
        [lambda c, s, t=t: captions.fill(t, c, s) for t in captions.CONCEPT_TEMPLATES],
        [lambda c, s, t=t: captions.fill(t, c, s) for t in captions.STYLE_TEMPLATES],
    )
    tables = []
    for templates in kinds:
        texts = [fill(c, s) for fill in templates for c in concepts for s in styles]
        ids = tokenizer(
            texts, padding="max_length", truncation=True, max_length=length
        ).input_ids
        shape = (len(templates), len(concepts), len(styles), length)
        tables.append(np.asarray(ids, np.int32).reshape(shape))
    return tables


def make_step(clip, tx: optax.GradientTransformation, cfg) -> loop.Step:
    """Returns the contrastive training step; frozen holds the caption tables."""

    def draw_ids(frozen, batch, kind, pick):
        where = (batch["concept"], batch["style"])
        both, concept, style = (
            t[(pick % t.shape[0], *where)] for t in frozen["captions"]
        )
        ids = jnp.where((kind == CONCEPT)[:, None], concept, both)
        return jnp.where((kind == STYLE)[:, None], style, ids)

    def loss_fn(params, images_BHWC, ids_BL, described_BB):
        images_BCHW = jnp.transpose(images_BHWC, (0, 3, 1, 2))
        image = _unit(hooks.apply_clip_image(clip, params, images_BCHW))
        text = _unit(hooks.apply_clip_text(clip, params, ids_BL))
        scale = jnp.exp(jnp.minimum(params["logit_scale"], jnp.log(100.0)))
        logits = scale * image @ text.T
        return 0.5 * (
            _cross_entropy(logits, described_BB)
            + _cross_entropy(logits.T, described_BB.T)
        ), logits

    def step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        k_augment, k_kind, k_template = jax.random.split(key, 3)
        batch = batch["train"]
        B = batch["concept"].shape[0]
        odds = jnp.asarray(cfg.caption_odds, jnp.float32)
        kind = jax.random.choice(k_kind, 3, (B,), p=odds)
        pick = jax.random.randint(k_template, (B,), 0, 1 << 20)
        images = augment.augment(
            k_augment,
            batch["image"].astype(jnp.float32) / 127.5 - 1.0,
            batch["may_flip"],
            flip=cfg.flip,
            shift=cfg.shift,
            scale=cfg.scale,
        )
        described = described_by(batch["concept"], batch["style"], kind)
        ids = draw_ids(frozen, batch, kind, pick)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, logits), grads = grad_fn(state.params, images, ids, described)
        updates, opt = tx.update(grads, state.opt["clip"], state.params)
        params = optax.apply_updates(state.params, updates)
        best = jnp.argmax(logits, axis=1)
        hit = jnp.take_along_axis(described, best[:, None], axis=1)
        ema = optax.incremental_update(params, state.ema, 1.0 - cfg.ema)
        metrics = {"clip/loss": loss, "clip/in_batch_accuracy": jnp.mean(hit)}
        state = state.replace(
            step=state.step + 1, params=params, opt={"clip": opt}, ema=ema
        )
        return state, metrics

    return step


def described_by(concept_B, style_B, kind_B):
    """Returns bool "B B": whether picture i is one that caption j describes.

    A caption without style describes every picture of its concept, and one without
    concept every picture of its style.
    """
    same_concept = concept_B[:, None] == concept_B[None, :]
    same_style = style_B[:, None] == style_B[None, :]
    by_concept = same_concept | (kind_B == STYLE)[None, :]
    by_style = same_style | (kind_B == CONCEPT)[None, :]
    return by_concept & by_style


def _unit(x_BD):
    return x_BD / jnp.linalg.norm(x_BD, axis=-1, keepdims=True)


def _cross_entropy(logits, positives):
    """Mean over rows of the cross entropy against the row's positives, each alike."""
    wanted = positives / jnp.sum(positives, axis=1, keepdims=True)
    return -jnp.mean(jnp.sum(wanted * jax.nn.log_softmax(logits, axis=1), axis=1))
