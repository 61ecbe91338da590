# SPDX-License-Identifier: Apache-2.0
"""Textual inversion: new words of a tokenizer, and a step that trains these alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_denoiser

from gift_jax.attacks import textual_inversion
from gift_jax.models import weights
from gift_jax.models.load import EMBEDDED
from gift_jax.models.tokenizer import load_tokenizer
from gift_jax.runtime.errors import UserError
from gift_jax.state import init_state

KEY = jax.random.key(4)


@pytest.fixture
def tokenizer():
    return load_tokenizer(EMBEDDED / "tokenizer")


def encode(text, ids):
    table = text["text_model"]["embeddings"]["token_embedding"]["embedding"]
    return {"states": table[ids]}


def test_step_trains_the_new_rows_only(rng):
    tx = optax.adam(1e-2)
    step = textual_inversion.make_step(toy_denoiser.denoiser(), encode, tx)
    table = jnp.asarray(rng.normal(size=(7, toy_denoiser.D)), jnp.float32)
    params = {"embeddings": textual_inversion.start(table, 2, 3)}
    np.testing.assert_array_equal(params["embeddings"], table[np.asarray([2, 2, 2])])
    state = init_state(params, {"attack": tx.init(params)})
    text = {weights.TOKEN_TABLE: table}
    frozen = {"unet": toy_denoiser.params(), "text": text}
    kept = jax.device_get(frozen)
    pairs = toy_denoiser.batch(4)
    del pairs["cond"]
    pairs["ids"] = jnp.asarray([[1, 7, 8]] * 4)  # row 9 is in no prompt
    new, _ = jax.jit(step)(state, frozen, {"data": pairs}, KEY)
    moved = np.abs(new.params["embeddings"] - params["embeddings"]).max(axis=1)
    assert (moved[:2] > 1e-3).all() and moved[2] == 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), kept)


def test_new_words_are_whole_tokens_at_the_end_of_the_vocabulary(tokenizer):
    known = len(tokenizer)
    textual_inversion.add_tokens(tokenizer, "<thing>", 3)
    ids = tokenizer("a <thing> <thing>_1 <thing>_2 cat", add_special_tokens=False)
    assert ids.input_ids[1:4] == [known, known + 1, known + 2]


def test_word_of_several_vectors_becomes_them_all(tiny):
    known, ids = len(tiny.tokenizer), {}
    for vectors in (1, 2):
        s = textual_inversion.TextualInversion(vectors=vectors)
        words = textual_inversion.tokenizer(s, tiny.folder)
        ids[vectors] = tiny.with_tokenizer(words).tokenize(["a <thing> cat"])[0]
    assert ids[2][2:4].tolist() == [known, known + 1]
    assert ids[2][4:-1].tolist() == ids[1][3:-2].tolist()


@pytest.mark.parametrize("token", ["", "a b", " a"])
def test_a_token_is_one_word(token):
    s = textual_inversion.TextualInversion(token=token)
    with pytest.raises(UserError, match=f"config.t.token='{token}' must be one word"):
        s.check("config.t")


def test_prompts_without_the_token_are_refused():
    s = textual_inversion.TextualInversion()
    textual_inversion.check_prompts(s, ["a <thing>", "<thing>s"])
    with pytest.raises(UserError, match="config.data: 'a dog' has no <thing>"):
        textual_inversion.check_prompts(s, ["a <thing>", "a dog"])


def test_words_of_the_vocabulary_are_refused(tokenizer):
    with pytest.raises(UserError, match="'guitar</w>' is in the model's vocabulary"):
        textual_inversion.add_tokens(tokenizer, "guitar</w>", 1)
    with pytest.raises(UserError, match="initializer='toy' is 2 tokens .to y</w>."):
        textual_inversion.initializer_id(tokenizer, "toy")
    with pytest.raises(UserError, match="initializer='' is no token"):
        textual_inversion.initializer_id(tokenizer, "")
    word = textual_inversion.initializer_id(tokenizer, "guitar")
    assert tokenizer.convert_ids_to_tokens(word) == "guitar</w>"
