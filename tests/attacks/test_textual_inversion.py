# SPDX-License-Identifier: Apache-2.0
"""Textual inversion: new words of a tokenizer, and a step that trains these alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_denoiser

from gift_jax.attacks import base as attacks_base
from gift_jax.attacks import textual_inversion
from gift_jax.models import weights
from gift_jax.models.load import EMBEDDED
from gift_jax.models.sd import stable_diffusion
from gift_jax.models.tokenizer import load_tokenizer
from gift_jax.runtime.errors import UserError
from gift_jax.state import init_state

KEY = jax.random.key(4)


@pytest.fixture
def tokenizer():
    return load_tokenizer(EMBEDDED / "tokenizer")


def encode(text, ids):
    return text["text_model"]["embeddings"]["token_embedding"]["embedding"][ids]


def test_step_trains_the_new_rows_only(rng):
    tx = optax.adam(1e-2)
    step = textual_inversion.make_step(toy_denoiser.denoiser(), encode, tx)
    table = jnp.asarray(rng.normal(size=(7, toy_denoiser.D)), jnp.float32)
    params = {"embeddings": textual_inversion.start(table, 2, 3)}
    np.testing.assert_array_equal(params["embeddings"], table[np.asarray([2, 2, 2])])
    state = init_state(params, {"attack": tx.init(params)})
    frozen = {
        "unet": toy_denoiser.params(),
        "text": {weights.TOKEN_TABLE: table},
        "abar": toy_denoiser.abar(),
    }
    kept = jax.device_get(frozen)
    pairs = toy_denoiser.batch(4)
    del pairs["text"]
    pairs["ids"] = jnp.asarray([[1, 7, 8]] * 4)  # row 9 is in no prompt
    new, _ = jax.jit(step)(state, frozen, {"attack": pairs}, KEY)
    moved = np.abs(new.params["embeddings"] - params["embeddings"]).max(axis=1)
    assert (moved[:2] > 1e-3).all() and moved[2] == 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), kept)


def test_new_words_are_whole_tokens_at_the_end_of_the_vocabulary(tokenizer):
    known = len(tokenizer)
    textual_inversion.add_tokens(tokenizer, "<thing>", 3)
    ids = tokenizer("a <thing> <thing>_1 <thing>_2 cat", add_special_tokens=False)
    assert ids.input_ids[1:4] == [known, known + 1, known + 2]


def test_word_of_several_vectors_becomes_them_all(tiny):
    model = attacks_base.with_tokens(tiny, "<thing>", 2)
    known = len(tiny.tokenizer)
    ids = stable_diffusion.tokenize(model, ["a <thing> cat"])
    assert ids[0, 2:4].tolist() == [known, known + 1]
    one = stable_diffusion.tokenize(
        attacks_base.with_tokens(tiny, "<thing>", 1), ["a <thing> cat"]
    )
    assert ids[0, 4:-1].tolist() == one[0, 3:-2].tolist()


@pytest.mark.parametrize(
    "token, vectors, message",
    [
        ("", 1, "config.inversion.token='' must be one word"),
        ("a b", 1, "config.inversion.token='a b' must be one word"),
        ("<thing>", 0, "config.inversion.vectors=0 must be at least 1"),
    ],
)
def test_bad_words_are_refused(token, vectors, message):
    with pytest.raises(UserError, match=message):
        textual_inversion.check_token(token, vectors)


def test_words_of_the_vocabulary_are_refused(tokenizer):
    with pytest.raises(UserError, match="'guitar</w>' is in the model's vocabulary"):
        textual_inversion.add_tokens(tokenizer, "guitar</w>", 1)
    with pytest.raises(UserError, match="initializer='toy' is 2 tokens .to y</w>."):
        textual_inversion.initializer_id(tokenizer, "toy")
    with pytest.raises(UserError, match="initializer='' is no token"):
        textual_inversion.initializer_id(tokenizer, "")
    word = textual_inversion.initializer_id(tokenizer, "guitar")
    assert tokenizer.convert_ids_to_tokens(word) == "guitar</w>"
