# SPDX-License-Identifier: Apache-2.0
"""Textual inversion: new words of a tokenizer, and a step that trains these alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_denoiser

from gift_jax.attacks import textual_inversion
from gift_jax.models import safetensors_io, weights
from gift_jax.models.load import EMBEDDED
from gift_jax.models.tokenizer import every_vector, load_tokenizer
from gift_jax.runtime.errors import UserError
from gift_jax.state import init_state

KEY = jax.random.key(4)


@pytest.fixture
def tokenizer():
    return load_tokenizer(EMBEDDED / "tokenizer")


def encode(text, ids):
    tower = text["text_encoder"]["text_model"]
    table = tower["embeddings"]["token_embedding"]["embedding"]
    return {"states": table[ids]}


def test_step_trains_the_new_rows_only(rng):
    tx = optax.adam(1e-2)
    step = textual_inversion.make_step(toy_denoiser.denoiser(), encode, tx)
    table = jnp.asarray(rng.normal(size=(7, toy_denoiser.D)), jnp.float32)
    params = {"text_encoder": textual_inversion.start(table, [2, 3, 2])}
    np.testing.assert_array_equal(params["text_encoder"], table[np.asarray([2, 3, 2])])
    state = init_state(params, {"attack": tx.init(params)})
    text = {"text_encoder": {weights.TOKEN_TABLE: table}}
    frozen = {"network": toy_denoiser.params(), "text": text}
    kept = jax.device_get(frozen)
    pairs = toy_denoiser.batch(4)
    del pairs["cond"]
    pairs["ids"] = jnp.asarray([[1, 7, 8]] * 4)  # row 9 is in no prompt
    new, _ = jax.jit(step)(state, frozen, {"data": pairs}, KEY)
    moved = np.abs(new.params["text_encoder"] - params["text_encoder"]).max(axis=1)
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
    textual_inversion.add_tokens(tokenizer, "<a>", 2)
    for token, known in (("<a>", "<a>"), ("<a>_1", "<a>_1"), ("<a>_7", "<a>")):
        with pytest.raises(UserError, match=f"{token}': '{known}' is in the model's"):
            textual_inversion.add_tokens(tokenizer, token, 1)


def test_initializer_is_a_token_for_all_vectors_or_one_for_each(tokenizer):
    ids = textual_inversion.initializer_ids(tokenizer, "guitar", 3)
    assert tokenizer.convert_ids_to_tokens(ids) == ["guitar</w>"] * 3
    ids = textual_inversion.initializer_ids(tokenizer, "guitar of water", 3)
    words = ["guitar</w>", "of</w>", "water</w>"]
    assert tokenizer.convert_ids_to_tokens(ids) == words
    for words, vectors, message in (
        ("toy", 1, "initializer='toy' is 2 tokens .to y</w>. to this model; choose a"),
        ("guitar of", 3, "is 2 tokens .* that is one, or 3, one for each vector"),
        ("", 1, "initializer='' is no token"),
    ):
        with pytest.raises(UserError, match=message):
            textual_inversion.initializer_ids(tokenizer, words, vectors)


@pytest.mark.parametrize(
    ("token", "vectors", "message"),
    [
        ("sks", 1, "'sks' would be found inside other words too; write it as '<sks>'"),
        ("guitar", 1, "inside other words too; write it as '<guitar>'"),
        ("Guitar_2", 1, "inside other words too; write it as '<guitar_2>'"),
        ("__metadata__", 1, "inside other words too; write it as '<metadata>'"),
        ("猫", 1, "inside other words too; write it as '<猫>'"),
        ("<My-Cat>", 4, "is not kept whole by .*; write it as '<my-cat>'"),
        ("<É>", 2, "is not kept whole by .*; write it as '<é>'"),
        ("<e\u0301>", 2, "is not kept whole by .*; write it as '<thing>'"),
    ],
)
def test_tokens_that_words_have_or_that_lose_vectors_are_refused(
    tokenizer, token, vectors, message
):
    textual_inversion.add_tokens(tokenizer, token, vectors)
    with pytest.raises(UserError, match=message):
        textual_inversion.check_token(tokenizer, token, vectors)


ACCEPTED = {
    "<thing>": 1, "<cat-toy>": 4, "<My-Cat>": 1, "<a.b>": 12, "s*": 2, "[v]": 2,
    "<é>": 3, "<猫>": 2, "<🐱>": 2, "<<x>>": 2, "{x}": 2, "cat-toy": 2, "<a>_b": 2,
}  # fmt: skip


def test_accepted_tokens_have_all_their_vectors_in_diffusers(tiny_folder, tmp_path):
    import torch
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    config = CLIPTextConfig.from_pretrained(tiny_folder / "text_encoder")
    folder = tiny_folder / "tokenizer"
    parts = dict.fromkeys(("vae", "unet", "scheduler"))
    for token, vectors in ACCEPTED.items():
        words = load_tokenizer(folder)
        textual_inversion.add_tokens(words, token, vectors)
        textual_inversion.check_token(words, token, vectors)
        rows = np.arange(vectors * 32, dtype=np.float32).reshape(vectors, 32) + 1
        file = tmp_path / "learned_embeds.safetensors"
        safetensors_io.write_float32(file, {token: rows})
        pipeline = StableDiffusionPipeline(
            tokenizer=CLIPTokenizer.from_pretrained(folder),
            text_encoder=CLIPTextModel(config).eval(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **parts,
        )
        pipeline.load_textual_inversion(str(file))
        table = pipeline.text_encoder.get_input_embeddings().weight
        for prompt in (
            token,
            f"a {token} b",
            f"({token}), a {token}'s b",
            f"x{token}y",
        ):
            text = pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer)
            theirs = pipeline.tokenizer(text)["input_ids"]
            ours = words(every_vector(words, prompt))["input_ids"]
            assert ours == theirs, (token, prompt)
            with torch.no_grad():
                learned = table[[i for i in theirs if i >= 514]].numpy()
            count = prompt.count(token)
            np.testing.assert_array_equal(learned, np.tile(rows, (count, 1)))


# --- a search for words ---------------------------------------------------------------


def _search_state(rng, tx, words=5):
    table = jnp.asarray(rng.normal(size=(words + 2, toy_denoiser.D)), jnp.float32)
    rows = table[np.asarray([1, 3])] + 0.05 * rng.normal(size=(2, toy_denoiser.D))
    params = {"text_encoder": jnp.asarray(rows, jnp.float32)}
    pairs = toy_denoiser.batch(4)
    del pairs["cond"]
    pairs["ids"] = jnp.asarray([[1, words + 2, words + 3]] * 4)
    text = {"text_encoder": {weights.TOKEN_TABLE: table}}
    frozen = {"network": toy_denoiser.params(), "text": text}
    return init_state(params, {"attack": tx.init(params)}), frozen, pairs, table


def test_search_for_words_has_the_loss_and_gradient_of_the_nearest_ones(rng):
    """Against PyTorch's straight-through gradient, written anew."""
    import torch

    tx = optax.sgd(1.0)
    state, frozen, pairs, table = _search_state(rng, tx)
    denoiser = toy_denoiser.denoiser()
    steps = {
        words: textual_inversion.make_step(denoiser, encode, tx, words=words)
        for words in (0, 5)
    }
    results = {
        words: step(state, frozen, {"data": pairs}, KEY)
        for words, step in steps.items()
    }
    losses = {words: float(m["attack/loss"]) for words, (_, m) in results.items()}
    assert losses[0] != pytest.approx(losses[5], rel=1e-4)

    # what plain textual inversion does at the words' own rows
    nearest = table[np.asarray([1, 3])]
    there = state.replace(params={"text_encoder": nearest})
    moved, metrics = steps[0](there, frozen, {"data": pairs}, KEY)
    assert losses[5] == pytest.approx(float(metrics["attack/loss"]), rel=1e-6)
    gradient = np.asarray(nearest - moved.params["text_encoder"])
    assert np.abs(gradient).max() > 1e-3
    ours = state.params["text_encoder"] - results[5][0].params["text_encoder"]
    np.testing.assert_allclose(ours, gradient, atol=1e-6)

    rows = torch.tensor(np.array(state.params["text_encoder"]), requires_grad=True)
    words = torch.tensor(np.array(table[:5]))
    cosine = torch.nn.functional.cosine_similarity(rows[:, None], words[None], dim=-1)
    chosen = cosine.argmax(1)
    assert chosen.tolist() == [1, 3]
    projected = rows + (words[chosen] - rows).detach()
    projected.backward(torch.tensor(gradient))
    np.testing.assert_allclose(rows.grad.numpy(), ours, atol=1e-6)


def test_words_that_were_searched_for_are_rows_of_the_model(tiny, caplog):
    s = textual_inversion.TextualInversion(vectors=2, discrete=True)
    table = textual_inversion.token_table(tiny.folder)
    words = textual_inversion.word_count(tiny.folder.load_tokenizer())
    assert 2 < words < len(table)
    near = {"text_encoder": 1.5 * table[[7, 11]] + 1e-4}
    changed = textual_inversion.changed(s, tiny.folder, near)[weights.TOKEN_TABLE]
    np.testing.assert_array_equal(changed[-2:], table[[7, 11]])
    free = textual_inversion.TextualInversion(vectors=2)
    rows = textual_inversion.learned_rows(free, tiny.folder, near)
    np.testing.assert_array_equal(rows["text_encoder"], near["text_encoder"])
