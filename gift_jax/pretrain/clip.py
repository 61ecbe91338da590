# SPDX-License-Identifier: Apache-2.0
"""The small CLIP: its text tower conditions emoji-sd, its image tower judges it."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gift_jax.data import captions
from gift_jax.models import params as model_params
from gift_jax.models import vision
from gift_jax.pretrain.step import augmented
from gift_jax.state import Loss

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
    vision = {"image_size": 64, "conv_channels": list(cfg.image_channels)}
    return {
        "architectures": ["ConvClip"],
        "model_type": "clip",
        "projection_dim": cfg.embedding,
        "logit_scale_init_value": 3.0,
        "text_config": {"model_type": "clip_text_model", **text},
        "vision_config": vision,
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


def init_params(clip, concepts: int, styles: int, key) -> dict:
    """Returns {"clip": the model's parameters, "proxies": a vector for every name}.

    The text tower is drawn anew, wide enough that captions start out different: from
    CLIP's own standard deviation of 0.01 the names take thousands of steps to part.
    """
    k_clip, k_text, k_concept, k_style = jax.random.split(key, 4)
    params = model_params.init_params(clip, k_clip)
    depth = len(params["text_model"]["encoder"]["layers"])

    def draw(path, leaf):
        *_, module, name = (part.key for part in path)
        key = jax.random.fold_in(
            k_text, zlib.crc32(jax.tree_util.keystr(path).encode())
        )
        if name == "embedding":
            return 0.1 * jax.random.normal(key, leaf.shape)
        if name != "kernel":
            return leaf
        last = module in ("out_proj", "fc2")  # what a block adds to its input
        scale = (leaf.shape[0] * (2 * depth if last else 1)) ** -0.5
        return scale * jax.random.normal(key, leaf.shape)

    params["text_model"] = jax.tree_util.tree_map_with_path(draw, params["text_model"])
    width = params["text_projection"]["kernel"].shape[1]
    proxies = {
        "concept": jax.random.normal(k_concept, (concepts, width)),
        "style": jax.random.normal(k_style, (styles, width)),
    }
    return {"clip": params, "proxies": proxies}


def make_loss(clip, cfg) -> Loss:
    """Returns the loss: contrast within the batch, and a proxy for each name.

    With few images of many concepts, contrast alone separates the names slowly, since
    either tower waits for the other. So both also learn to tell the names apart, next
    to vectors that stand for them ("No Fuss Distance Metric Learning using Proxies",
    arXiv 1703.07464); only the towers are kept.

    frozen: {"captions": tables of `caption_tables`}.
    """

    def loss_fn(params, frozen, batch, key):
        k_augment, k_kind, k_template = jax.random.split(key, 3)
        B = batch["concept"].shape[0]
        odds = jnp.asarray(cfg.caption_odds, jnp.float32)
        kind_B = jax.random.choice(k_kind, 3, (B,), p=odds)
        pick_B = jax.random.randint(k_template, (B,), 0, 1 << 20)
        ids_BL = _draw_ids(frozen["captions"], batch, kind_B, pick_B)
        images_BHWC = augmented(k_augment, batch, cfg)
        images_BCHW = jnp.transpose(images_BHWC, (0, 3, 1, 2))
        image_BD = _unit(vision.apply_clip_image(clip, params["clip"], images_BCHW))
        text_BD = _unit(vision.apply_clip_text(clip, params["clip"], ids_BL))
        scale = jnp.exp(jnp.minimum(params["clip"]["logit_scale"], jnp.log(100.0)))
        loss = _contrast(scale, image_BD, text_BD, batch, kind_B)
        metrics = {"clip/contrast": loss}
        for name, other in (("concept", STYLE), ("style", CONCEPT)):
            proxy_ND = scale * _unit(params["proxies"][name])
            named_B = kind_B != other  # captions that name it
            term, accuracies = _name_loss(
                batch[name], image_BD @ proxy_ND.T, text_BD @ proxy_ND.T, named_B
            )
            loss += term
            metrics[f"clip/{name}_accuracy"] = accuracies[0]
            metrics[f"clip/{name}_accuracy_text"] = accuracies[1]
        return loss, metrics

    return loss_fn


def _contrast(scale, image_BD, text_BD, batch, kind_B):
    """Returns the mean cross entropy of images against captions, both ways."""
    logits_BB = scale * image_BD @ text_BD.T
    described_BB = described_by(batch["concept"], batch["style"], kind_B)
    by_image = _cross_entropy(logits_BB, described_BB)
    return 0.5 * (by_image + _cross_entropy(logits_BB.T, described_BB.T))


def _name_loss(name_B, by_image_BN, by_text_BN, named_B):
    """Returns (loss of telling the names apart, accuracy by image and by text)."""
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    loss = jnp.mean(cross_entropy(by_image_BN, name_B))
    loss += _mean(cross_entropy(by_text_BN, name_B), named_B)
    by_image, by_text = (
        jnp.argmax(logits_BN, axis=1) == name_B
        for logits_BN in (by_image_BN, by_text_BN)
    )
    return loss, (jnp.mean(by_image), _mean(by_text, named_B))


def _draw_ids(tables, batch, kind_B, pick_B):
    """Returns int32 "B L": each example's caption, of its kind and a drawn template."""
    where = (batch["concept"], batch["style"])
    both, concept, style = (t[(pick_B % t.shape[0], *where)] for t in tables)
    ids = jnp.where((kind_B == CONCEPT)[:, None], concept, both)
    return jnp.where((kind_B == STYLE)[:, None], style, ids)


def described_by(concept_B, style_B, kind_B):
    """Returns bool "B B": whether image i is one that caption j describes.

    A caption without style describes every image of its concept, and one without
    concept every image of its style.
    """
    same_concept = concept_B[:, None] == concept_B[None, :]
    same_style = style_B[:, None] == style_B[None, :]
    by_concept = same_concept | (kind_B == STYLE)[None, :]
    by_style = same_style | (kind_B == CONCEPT)[None, :]
    return by_concept & by_style


def _mean(x_B, where_B):
    return jnp.sum(x_B * where_B) / jnp.maximum(1, jnp.sum(where_B))


def _unit(x_BD):
    return x_BD / jnp.linalg.norm(x_BD, axis=-1, keepdims=True)


def _cross_entropy(logits, positives):
    """Mean over rows of the cross entropy against the row's positives, each alike."""
    target = positives / jnp.sum(positives, axis=1, keepdims=True)
    return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(logits, axis=1), axis=1))
