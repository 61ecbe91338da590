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

    Each is int32 "V N S L": template variant, concept, style, tokens; L is as short as
    the longest caption allows, see `name_tables`.
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
    longest = max(int(np.max(np.sum(t != tokenizer.pad_token_id, -1))) for t in tables)
    return [t[..., : longest + 1] for t in tables]


def name_tables(tokenizer, concepts, styles) -> dict[str, np.ndarray]:
    """Returns token ids of every name alone, {"concept": "V N L", "style": "V S L"}.

    L is as short as the longest allows: the text tower is causal and pools at the end
    mark, so what is cut off has no effect.
    """

    def table(templates, fill, names):
        ids = [
            tokenizer([fill(t, name) for name in names]).input_ids for t in templates
        ]
        length = max(len(row) for rows in ids for row in rows)
        pad = tokenizer.pad_token_id
        padded = [[row + [pad] * (length - len(row)) for row in rows] for rows in ids]
        return np.asarray(padded, np.int32)

    return {
        "concept": table(
            captions.CONCEPT_TEMPLATES, lambda t, c: captions.fill(t, c, ""), concepts
        ),
        "style": table(
            captions.STYLE_TEMPLATES, lambda t, s: captions.fill(t, "", s), styles
        ),
    }


def make_step(clip, tx: optax.GradientTransformation, cfg) -> loop.Step:
    """Returns the training step: contrast within the batch, and against every name.

    With few pictures of many things, contrast within a batch alone separates the names
    slowly: so each picture is also compared with all concepts and all styles.

    frozen: {"captions": tables of `caption_tables`, "names": those of `name_tables`}.
    """

    def loss_fn(params, images_BHWC, ids_BL, described_BB, batch, names):
        images_BCHW = jnp.transpose(images_BHWC, (0, 3, 1, 2))
        image = _unit(hooks.apply_clip_image(clip, params, images_BCHW))
        embed = lambda ids: _unit(hooks.apply_clip_text(clip, params, ids))  # noqa: E731
        scale = jnp.exp(jnp.minimum(params["logit_scale"], jnp.log(100.0)))
        logits = scale * image @ embed(ids_BL).T
        contrast = 0.5 * (
            _cross_entropy(logits, described_BB)
            + _cross_entropy(logits.T, described_BB.T)
        )
        total, metrics = cfg.contrast_weight * contrast, {"clip/contrast": contrast}
        for kind, weight in (("concept", cfg.concept_weight), ("style", 1.0)):
            all_names = scale * image @ embed(names[kind]).T
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels
            total += weight * jnp.mean(cross_entropy(all_names, batch[kind]))
            right = jnp.argmax(all_names, axis=1) == batch[kind]
            metrics[f"clip/{kind}_accuracy"] = jnp.mean(right)
        return total, metrics

    def step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        k_augment, k_kind, k_template, k_names = jax.random.split(key, 4)
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
        ids = _draw_ids(frozen["captions"], batch, kind, pick)
        variant = jax.random.randint(k_names, (), 0, 1 << 20)
        names = {k: t[variant % t.shape[0]] for k, t in frozen["names"].items()}
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, metrics), grads = grad_fn(
            state.params, images, ids, described, batch, names
        )
        updates, opt = tx.update(grads, state.opt["clip"], state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 1.0 - cfg.ema)
        state = state.replace(
            step=state.step + 1, params=params, opt={"clip": opt}, ema=ema
        )
        return state, {"clip/loss": loss, **metrics}

    return step


def _draw_ids(tables, batch, kind_B, pick_B):
    """Returns int32 "B L": each example's caption, of its kind and a drawn template."""
    where = (batch["concept"], batch["style"])
    both, concept, style = (t[(pick_B % t.shape[0], *where)] for t in tables)
    ids = jnp.where((kind_B == CONCEPT)[:, None], concept, both)
    return jnp.where((kind_B == STYLE)[:, None], style, ids)


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
