# SPDX-License-Identifier: Apache-2.0
"""Textual inversion as an attack: only the embeddings of new tokens train.

Source: Gal et al. 2022, arXiv:2208.01618; start, names and files as diffusers'
examples/textual_inversion/textual_inversion.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import unflatten_dict

from gift_jax.attacks import descent, dreambooth
from gift_jax.diffusion import Denoiser
from gift_jax.models import weights
from gift_jax.runtime.errors import UserError
from gift_jax.state import Step


def names(token: str, vectors: int) -> list[str]:
    """Returns the tokens that stand for `token`: "<a>", "<a>_1", "<a>_2" ..."""
    return [token] + [f"{token}_{i}" for i in range(1, vectors)]


def check_token(token: str, vectors: int) -> None:
    """Raises UserError for a token that no tokenizer can be given, or vectors < 1."""
    if not token or token != "".join(token.split()):
        raise UserError(
            f"config.inversion.token={token!r} must be one word; try '<thing>'"
        )
    if vectors < 1:
        raise UserError(f"config.inversion.vectors={vectors} must be at least 1; try 1")


def add_tokens(tokenizer, token: str, vectors: int) -> None:
    """Adds the token's names to a transformers tokenizer, in place.

    Raises: UserError if one is in its vocabulary, or it does not keep them whole.
    """
    wanted, known = names(token, vectors), tokenizer.get_vocab()
    for name in wanted:
        if name in known:
            raise UserError(
                f"config.inversion.token={token!r}: {name!r} is in the model's "
                "vocabulary already; choose another word"
            )
    tokenizer.add_tokens(wanted)
    if tokenizer.tokenize(f"a {' '.join(wanted)} b")[1:-1] != wanted:
        raise UserError(
            f"config.inversion.token={token!r} is cut by the model's tokenizer; "
            "choose a word in lower case, such as '<thing>'"
        )


def initializer_id(tokenizer, word: str) -> int:
    """Returns the id of the one token that a word is; UserError if it is not one."""
    tokens = tokenizer.tokenize(word)
    if len(tokens) != 1:
        said = f"{len(tokens)} tokens ({' '.join(tokens)})" if tokens else "no token"
        raise UserError(
            f"config.inversion.initializer={word!r} is {said} to this model; choose a "
            "word that is one"
        )
    return tokenizer.convert_tokens_to_ids(tokens[0])


def start(table_VD: np.ndarray, word: int, vectors: int) -> jax.Array:
    """Returns the new tokens' embeddings at their start, float32 "vectors D".

    Each is that of the initializer's token: row `word` of table_VD, float32 "V D".
    """
    return jnp.tile(jnp.asarray(table_VD[word], jnp.float32)[None], (vectors, 1))


def make_step(
    denoiser: Denoiser,
    encode: dreambooth.Encode,
    tx: optax.GradientTransformation,
    parts: int = 1,
) -> Step:
    """Returns the attack's step: the diffusion loss, trained through new rows alone.

    state.params: {"embeddings": float32 "vectors D"}; state.opt: {"attack"}. frozen:
    {"unet", "text": every parameter, flat, the token table as it was before; "abar":
    float32 "T"}. batch: {"attack": pairs with ids, int32 "B L", in place of text}.
    parts: see `losses.in_parts`.
    """

    def loss_fn(params, frozen, batch, key):
        rows_ND = params["embeddings"]
        table_VD = frozen["text"][weights.TOKEN_TABLE].astype(rows_ND.dtype)
        grown_VD = jnp.concatenate([table_VD, rows_ND])
        text = unflatten_dict(
            {**frozen["text"], weights.TOKEN_TABLE: grown_VD}, sep="/"
        )
        pairs = batch["attack"]
        pairs = {**pairs, "text": encode(text, pairs["ids"])}
        unet = unflatten_dict(frozen["unet"], sep="/")
        return jnp.mean(denoiser.losses(unet, frozen["abar"], pairs, key)[0]), {}

    return descent.make_step(loss_fn, tx, parts)
