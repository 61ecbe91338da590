# SPDX-License-Identifier: Apache-2.0
"""Textual inversion as an attack: only the embeddings of new tokens train.

Source: Gal et al. 2022, arXiv:2208.01618; start, names and files as diffusers'
examples/textual_inversion/textual_inversion.py.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from gift_jax.attacks import base
from gift_jax.attacks.dreambooth import EncodeIds
from gift_jax.diffusion import Denoiser
from gift_jax.models.weights import TOKEN_TABLE
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError, shown
from gift_jax.state import Step, make_descent


@dataclasses.dataclass(frozen=True)
class TextualInversion:
    """The fields of textual inversion."""

    token: str = config.value("<thing>", "new to the model; the prompts have it")
    initializer: str = config.value("thing", "a word that is one token: the start")
    vectors: int = config.number(1, low=1, doc="embeddings that the token stands for")

    def check(self, field: str) -> None:
        if not self.token or self.token != "".join(self.token.split()):
            raise UserError(
                f"{field}.token={self.token!r} must be one word; try '<thing>'"
            )


def names(token: str, vectors: int) -> list[str]:
    """Returns the tokens that stand for `token`: "<a>", "<a>_1", "<a>_2" ..."""
    return [token] + [f"{token}_{i}" for i in range(1, vectors)]


def add_tokens(tokenizer, token: str, vectors: int) -> None:
    """Adds the token's names to a transformers tokenizer, in place.

    Raises: UserError if one is in its vocabulary, or it does not keep them whole.
    """
    added, vocabulary = names(token, vectors), tokenizer.get_vocab()
    for name in added:
        if name in vocabulary:
            raise UserError(
                f"config.textual_inversion.token={token!r}: {name!r} is in the model's "
                "vocabulary already; choose another word"
            )
    tokenizer.add_tokens(added)
    if tokenizer.tokenize(f"a {' '.join(added)} b")[1:-1] != added:
        raise UserError(
            f"config.textual_inversion.token={token!r} is cut by the model's "
            "tokenizer; choose a word in lower case, such as '<thing>'"
        )


def initializer_id(tokenizer, word: str) -> int:
    """Returns the id of the one token that a word is; UserError if it is not one."""
    tokens = tokenizer.tokenize(word)
    if len(tokens) != 1:
        count = f"{len(tokens)} tokens ({' '.join(tokens)})" if tokens else "no token"
        raise UserError(
            f"config.textual_inversion.initializer={word!r} is {count} to this "
            "model; choose a word that is one"
        )
    return tokenizer.convert_tokens_to_ids(tokens[0])


def start(table_VD: np.ndarray, word: int, vectors: int) -> jax.Array:
    """Returns the new tokens' embeddings at their start, float32 "vectors D".

    Each is that of the initializer's token: row `word` of table_VD, float32 "V D".
    """
    return jnp.tile(jnp.asarray(table_VD[word], jnp.float32)[None], (vectors, 1))


def make_step(
    denoiser: Denoiser,
    encode_ids: EncodeIds,
    tx: optax.GradientTransformation,
    micro_batches: int = 1,
) -> Step:
    """Returns the attack's step: the denoising loss, trained through new rows alone.

    state.params: {"embeddings": float32 "vectors D"}; state.opt: {"attack"}. frozen:
    {"unet", "text": every parameter, flat, the token table as it was before}. batch:
    {"data": pairs with ids, int32 "B L", in place of cond}. micro_batches: see
    `state.accumulate_gradients`.
    """

    def loss_fn(params, frozen, batch, key):
        rows_ND = params["embeddings"]
        table_VD = frozen["text"][TOKEN_TABLE].astype(rows_ND.dtype)
        table_VD = jnp.concatenate([table_VD, rows_ND])
        text = unflatten_dict({**frozen["text"], TOKEN_TABLE: table_VD}, sep="/")
        pairs = batch["data"]
        pairs = {**pairs, "cond": encode_ids(text, pairs["ids"])}
        network = unflatten_dict(frozen["unet"], sep="/")
        loss = jnp.mean(denoiser.losses(network, pairs, key)[0])
        return loss, {"attack/loss": loss}

    return make_descent("attack", loss_fn, tx, micro_batches)


def plan(task: base.Task) -> base.Plan:
    """Returns the plan of textual inversion.

    Its model has the new words, and text parameters as many rows short.
    """
    s, model = task.settings, task.model
    table_VD = token_table(model.folder)
    word = initializer_id(model.tokenizer, s.initializer)
    attacked = model.with_tokenizer(tokenizer(s, model.folder))
    text: dict[str, Any] = flatten_dict(model.params["text_encoder"], sep="/")
    text[TOKEN_TABLE] = table_VD

    def files(params):
        return {"learned_embeds.safetensors": {s.token: params["embeddings"]}}

    return base.Plan(
        model=attacked,
        step=make_step(
            model.denoiser, attacked.encode_ids, task.tx, task.micro_batches
        ),
        params={"embeddings": start(table_VD, word, s.vectors)},
        frozen={"unet": flatten_dict(model.params["unet"], sep="/"), "text": text},
        reads_ids=True,
        files=files,
    )


def tokenizer(s: TextualInversion, folder):
    """Returns the tokenizer of a model folder with the new tokens."""
    words = folder.load_tokenizer()
    add_tokens(words, s.token, s.vectors)
    return words


def token_table(folder) -> np.ndarray:
    """Returns the rows that a folder's tokenizer uses, float32 "V D", from its files.

    As transformers' resize_token_embeddings: rows past the vocabulary are dropped.

    Raises: UserError if the text encoder has fewer.
    """
    table = folder.float32_params("text_encoder", (TOKEN_TABLE,))[TOKEN_TABLE]
    used = len(folder.load_tokenizer())
    if len(table) < used:
        raise UserError(
            f"{folder.path}: the tokenizer has {used} tokens, but the text encoder "
            f"{len(table)} rows; they are of different models"
        )
    return np.asarray(table[:used])


def changed(s: TextualInversion, folder, params) -> base.Flat:
    """Returns the token table with the learned rows."""
    rows = np.asarray(params["embeddings"])
    return {TOKEN_TABLE: np.concatenate([token_table(folder), rows])}


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
    trained=lambda s: "embeddings of a new word",
    names_concept=False,
)
