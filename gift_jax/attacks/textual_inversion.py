# SPDX-License-Identifier: Apache-2.0
"""Textual inversion as an attack: only the embeddings of new tokens train.

With `discrete` the embeddings are those of words that the model has: a search for a
prompt that anyone could type, by which the concept comes back without any training of
the model. Many vectors and few steps make the same search over free embeddings.

Source: Gal et al. 2022, arXiv:2208.01618; start, names and files as diffusers'
examples/textual_inversion/textual_inversion.py. discrete: PEZ, Wen et al. 2023,
arXiv:2302.03668, algorithm 1; on erased models as Ring-A-Bell and UnlearnDiffAtk.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike
from tokenizers.pre_tokenizers import ByteLevel

from gift_jax.attacks import base
from gift_jax.attacks.dreambooth import EncodeIds, with_encoded_ids
from gift_jax.diffusion import Denoiser
from gift_jax.models.sd.adapters import SDXL_NAMES
from gift_jax.models.tokenizer import every_vector, vector_names
from gift_jax.models.weights import TEXT_ENCODERS, TOKEN_TABLE, joined_path
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError, shown
from gift_jax.state import Step, make_descent

_FIELD = "config.textual_inversion"


@dataclasses.dataclass(frozen=True)
class TextualInversion:
    """The fields of textual inversion."""

    token: str = config.value("<thing>", "new to the model; the prompts have it")
    initializer: str = config.value(
        "thing", "the start: a word that is one token, or as many tokens as vectors"
    )
    vectors: int = config.number(1, low=1, doc="embeddings that the token stands for")
    discrete: bool = config.value(
        False, "each is the nearest word's of the model: a prompt is searched for"
    )

    def check(self, field: str) -> None:
        if not self.token or self.token != "".join(self.token.split()):
            raise UserError(
                f"{field}.token={self.token!r} must be one word; try '<thing>'"
            )


def add_tokens(tokenizer, token: str, vectors: int) -> None:
    """Adds the token's names to a transformers tokenizer, in place.

    Raises: UserError if one is known to it, as diffusers' load_textual_inversion does.
    """
    added, vocabulary = vector_names(token, vectors), tokenizer.get_vocab()
    stem = re.sub(r"_\d+$", "", token)  # of a token of several vectors
    for name in (*added, f"{token}_1", *([stem] if stem != token else [])):
        if name in vocabulary:
            raise UserError(
                f"{_FIELD}.token={shown(token)}: {shown(name)} is in the model's "
                "vocabulary already; choose another word"
            )
    first = len(tokenizer)
    tokenizer.add_tokens(added)
    ids = tokenizer.convert_tokens_to_ids(added)
    if ids != list(range(first, first + vectors)):
        raise UserError(
            f"{_FIELD}.token={shown(token)} becomes the ids {shown(ids)}, not those "
            f"from {first} on; the model's tokenizer numbers its words with gaps"
        )


def check_token(tokenizer, token: str, vectors: int) -> None:
    """Raises UserError for a token that other words have, or that loses its vectors.

    What a prompt becomes is what diffusers' pipelines make of it, once they have loaded
    the token. Args: tokenizer: with the token's names added.
    """
    letters = ByteLevel(add_prefix_space=False, use_regex=False)
    text = "".join(part for part, _ in letters.pre_tokenize_str(token.lower()))
    vocabulary = set(tokenizer.get_vocab()) - set(vector_names(token, vectors))
    if re.fullmatch(r"\w+", token) or any(text in word for word in vocabulary):
        bare = token.strip("<>_*") or "thing"
        raise UserError(
            f"{_FIELD}.token={shown(token)} would be found inside other words too; "
            f"write it as '<{bare.lower()}>'"
        )
    new = tokenizer.convert_tokens_to_ids(vector_names(token, vectors))
    prompt = every_vector(tokenizer, f"a {token} b")
    if tokenizer(prompt, add_special_tokens=False)["input_ids"][1:-1] != new:
        lower = token.lower()
        fix = f"'{lower}'" if lower != token else "'<thing>', of plain letters"
        raise UserError(
            f"{_FIELD}.token={shown(token)} is not kept whole by the model's "
            f"tokenizer, so that diffusers would lose vectors; write it as {fix}"
        )


def initializer_ids(tokenizer, words: str, vectors: int) -> list[int]:
    """Returns the id that each vector starts from: one for all, or one for each.

    Raises: UserError if the initializer is another number of tokens.
    """
    tokens = tokenizer.tokenize(words)
    if len(tokens) not in (1, vectors):
        count = f"{len(tokens)} tokens ({' '.join(tokens)})" if tokens else "no token"
        each = f", or {vectors}, one for each vector" if vectors > 1 else ""
        raise UserError(
            f"{_FIELD}.initializer={shown(words)} is {count} to this model; choose a "
            f"word that is one{each}"
        )
    ids = tokenizer.convert_tokens_to_ids(tokens)
    return ids * vectors if len(ids) == 1 else ids


def start(table_VD: np.ndarray, ids: Sequence[int]) -> jax.Array:
    """Returns the new tokens' embeddings at their start, float32 "vectors D".

    Each is that of an initializer's token: rows `ids` of table_VD, float32 "V D".
    """
    return jnp.asarray(table_VD[np.asarray(ids)], jnp.float32)


def nearest_ids(rows: Sequence[ArrayLike], words: Sequence[ArrayLike]) -> jax.Array:
    """Returns the nearest word of each row, int "N", by their cosine.

    Args: rows, words: of each text encoder, "N D" and "W D"; their cosines are added.
    """

    def cosines(rows_ND, words_WD):
        both = jnp.asarray(rows_ND), jnp.asarray(words_WD)
        units = [x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in both]
        return units[0] @ units[1].T

    return jnp.argmax(sum(map(cosines, rows, words)), axis=1)


def make_step(
    denoiser: Denoiser,
    encode_ids: EncodeIds,
    tx: optax.GradientTransformation,
    micro_batches: int = 1,
    *,
    words: int = 0,
) -> Step:
    """Returns the attack's step: the denoising loss, trained through new rows alone.

    state.params: {text encoder's component: float32 "vectors D"}; state.opt:
    {"attack"}. frozen: {"network": every parameter, flat; "text": {component: the same,
    the token table as it was before}}. batch: {"data": pairs with ids, int32 "B L", in
    place of cond, or cond of images alone}. micro_batches: see
    `state.accumulate_gradients`. words: the loss, and its gradient, are those of the
    nearest of the tables' first rows, so many; 0: of the rows themselves.
    """

    def loss_fn(params, frozen, batch, key):
        tables = {
            name: frozen["text"][name][TOKEN_TABLE].astype(rows.dtype)
            for name, rows in params.items()
        }
        if words:  # straight through to the rows that train
            ids = nearest_ids(
                list(params.values()), [tables[name][:words] for name in params]
            )
            params = {
                name: rows + jax.lax.stop_gradient(tables[name][ids] - rows)
                for name, rows in params.items()
            }
        text = {}
        for name, rows_ND in params.items():
            table_VD = jnp.concatenate([tables[name], rows_ND])
            flat = {**frozen["text"][name], TOKEN_TABLE: table_VD}
            text[name] = unflatten_dict(flat, sep="/")
        pairs = with_encoded_ids(encode_ids, text, batch["data"])
        network = unflatten_dict(frozen["network"], sep="/")
        loss = jnp.mean(denoiser.losses(network, pairs, key)[0])
        return loss, {"attack/loss": loss}

    return make_descent("attack", loss_fn, tx, micro_batches)


def plan(task: base.Task) -> base.Plan:
    """Returns the plan of textual inversion.

    Its model has the new words, and text parameters as many rows short.
    """
    s, model = task.settings, task.model
    attacked = model.with_tokenizer(tokenizer(s, model.folder))
    ids = initializer_ids(model.tokenizer, s.initializer, s.vectors)
    text: dict[str, Any] = {}
    for name in model.text_components:
        text[name] = flatten_dict(model.params[name], sep="/")
        text[name][TOKEN_TABLE] = token_table(model.folder, name)

    words = word_count(model.tokenizer) if s.discrete else 0

    def files(params) -> dict[str, base.Flat]:
        rows = learned_rows(s, model.folder, params)
        names = [s.token] if len(rows) == 1 else list(SDXL_NAMES)
        arrays: base.Flat = dict(zip(names, rows.values(), strict=True))
        return {"learned_embeds.safetensors": arrays}

    return base.Plan(
        model=attacked,
        step=make_step(
            model.denoiser,
            attacked.encode_ids,
            task.tx,
            task.micro_batches,
            words=words,
        ),
        params={name: start(text[name][TOKEN_TABLE], ids) for name in text},
        frozen={"network": flatten_dict(model.denoiser_params, sep="/"), "text": text},
        reads_ids=True,
        files=files,
    )


def tokenizer(s: TextualInversion, folder):
    """Returns the tokenizer of a model folder with the new tokens."""
    words = folder.load_tokenizer()
    add_tokens(words, s.token, s.vectors)
    check_token(words, s.token, s.vectors)
    return words


def token_table(folder, component: str = "text_encoder") -> np.ndarray:
    """Returns the rows that a folder's tokenizer uses, float32 "V D", from its files.

    As transformers' resize_token_embeddings: rows past the vocabulary are dropped.

    Raises: UserError if the text encoder has fewer.
    """
    table = folder.float32_params(component, (TOKEN_TABLE,))[TOKEN_TABLE]
    used = len(folder.load_tokenizer())
    if len(table) < used:
        raise UserError(
            f"{folder.path}: the tokenizer has {used} tokens, but the text encoder "
            f"{len(table)} rows; they are of different models"
        )
    return np.asarray(table[:used])


def changed(s: TextualInversion, folder, params) -> base.Flat:
    """Returns the token tables with the learned rows."""
    return {
        joined_path(name, TOKEN_TABLE): np.concatenate([token_table(folder, name), new])
        for name, new in learned_rows(s, folder, params).items()
    }


def learned_rows(s: TextualInversion, folder, params) -> dict[str, np.ndarray]:
    """Returns {component: the new tokens' embeddings, "vectors D"}.

    Of words, if discrete.
    """
    rows = {name: np.asarray(params[name]) for name in TEXT_ENCODERS if name in params}
    if not s.discrete:
        return rows
    tables = {name: token_table(folder, name) for name in rows}
    words = folder.load_tokenizer()
    count = word_count(words)
    nearest = nearest_ids(list(rows.values()), [t[:count] for t in tables.values()])
    ids = np.asarray(nearest)
    prompt = "".join(words.convert_ids_to_tokens(ids.tolist()))
    logging.info("%s stands for %r", s.token, prompt.replace("</w>", " ").strip())
    return {name: table[ids] for name, table in tables.items()}


def word_count(tokenizer) -> int:
    """Returns how many rows are words: those before the first special token."""
    return min(tokenizer.all_special_ids)


def check_prompts(s: TextualInversion, prompts: Sequence[str]) -> None:
    """Raises UserError for a prompt without the token that is to be learned."""
    for prompt in prompts:
        if s.token not in prompt:
            raise UserError(
                f"config.data: {shown(prompt)} has no {s.token}, which config."
                "textual_inversion.token is to learn; write it where the thing is "
                f"named: 'a photo of {s.token}'"
            )


ATTACK = base.Attack(
    config=TextualInversion,
    title="textual inversion (arXiv:2208.01618)",
    plan=plan,
    changed=changed,
    tokenizer=tokenizer,
    check_prompts=check_prompts,
    trained=lambda s: (
        f"nothing; a prompt of {s.vectors} tokens is searched for"
        if s.discrete
        else "embeddings of a new word"
    ),
    names_concept=False,
)
