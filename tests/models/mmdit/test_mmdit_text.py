# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3's text: T5, its tokenizer, and what all encoders return."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from tiny_model import relative_error
from tiny_sd3 import TINY_SD3, write_tiny_sd3
from tokenizers import Tokenizer

from gift_jax.models import mmdit, weights
from gift_jax.models.mmdit import random_weights
from gift_jax.models.mmdit.t5 import position_buckets
from gift_jax.models.mmdit.text import TextEncoders, tokenize
from gift_jax.models.mmdit.tokenizer import load_t5_tokenizer
from gift_jax.models.tokenizer import load_tokenizer
from gift_jax.runtime.errors import UserError

TOLERANCE = 1e-5
LENGTH, T5_LENGTH = 16, 40
PROMPTS = ["a Dog!", "", "one that is cut after sixteen tokens of CLIP's, and forty"]


def load_text(folder):
    """Returns (modules, {component: parameters}, tokenizers) of a tiny folder."""
    names = [n for n in mmdit.KIND_OF if n.startswith("text")]
    parts = {
        name: weights.load_component(folder / name, mmdit.KIND_OF[name])
        for name in names
        if (folder / name).is_dir()
    }
    first, second, *t5 = (module for module, _, _ in parts.values())
    encoders = TextEncoders(
        (first, second), t5[0] if t5 else None, 96, LENGTH, T5_LENGTH
    )
    tokenizers = [
        load_tokenizer(folder / name) for name in ("tokenizer", "tokenizer_2")
    ]
    tokenizers += [load_t5_tokenizer(folder / "tokenizer_3") for _ in t5]
    return encoders, {name: parts[name][1] for name in parts}, tokenizers


# --- T5 -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [7, 60])  # beyond the furthest distance, too
def test_t5_equals_pytorch(sd3_folder, rng, length):
    torch = pytest.importorskip("torch")
    from transformers import T5EncoderModel

    folder = sd3_folder / "text_encoder_3"
    theirs = T5EncoderModel.from_pretrained(str(folder)).eval()
    module, params, _ = weights.load_component(folder, "text_encoder_3")
    ids = rng.integers(0, 300, size=(2, length)).astype(np.int32)
    ours = jax.jit(lambda p: mmdit.apply_t5(module, p, ids))(params)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).last_hidden_state.numpy()
    assert relative_error(ours, expected) < TOLERANCE
    backward = mmdit.apply_t5(module, params, ids[:, ::-1])[:, ::-1]
    assert relative_error(backward, ours) > 1e-3  # places matter


@pytest.mark.parametrize("buckets, furthest", [(32, 128), (16, 20), (8, 128), (64, 99)])
def test_distances_are_in_pytorchs_buckets(buckets, furthest):
    torch = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    place = torch.arange(520)
    offset = place[None] - place[:, None]
    expected = T5Attention._relative_position_bucket(offset, True, buckets, furthest)
    ours = position_buckets(520, buckets, furthest)
    np.testing.assert_array_equal(ours, expected.numpy())
    assert len(np.unique(ours)) > buckets // 2


def test_t5_has_its_table_under_either_name(sd3_folder, tmp_path):
    folder = shutil.copytree(sd3_folder / "text_encoder_3", tmp_path / "t5")
    _, expected, _ = weights.load_component(folder, "text_encoder_3")
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    table = tensors.pop("shared.weight")
    for names in (
        ["encoder.embed_tokens.weight"],
        ["shared.weight", "encoder.embed_tokens.weight"],
    ):
        safetensors.numpy.save_file(tensors | dict.fromkeys(names, table), file)
        _, params, _ = weights.load_component(folder, "text_encoder_3")
        jax.tree.map(np.testing.assert_array_equal, params, expected)
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(UserError, match=r"1 missing tensors, e\.g\. shared\.weight"):
        weights.load_component(folder, "text_encoder_3")


# --- T5's tokenizer -------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """T5's tokenizer, to spoil."""
    random_weights.write_t5_tokenizer(tmp_path / "t5")
    return tmp_path / "t5"


def test_t5_ids_are_those_of_its_file(folder):
    tokenizer = load_t5_tokenizer(folder)
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (*PROMPTS, "two  spaces\nand a 猫", "<extra_id_0> </s> x"):
        ids = tokenizer(text)["input_ids"]
        assert ids == file.encode(text).ids and ids[-1] == 1
    options = {"padding": "max_length", "truncation": True, "max_length": 5}
    assert tokenizer(["a", "abcdefgh"], **options)["input_ids"] == [
        [file.token_to_id("\u2581a"), 1, 0, 0, 0],
        [file.token_to_id(token) for token in ("\u2581a", "b", "c", "d", "</s>")],
    ]


def test_t5_does_not_read_spiece_model(folder):
    expected = load_t5_tokenizer(folder)(PROMPTS)["input_ids"]
    (folder / "spiece.model").write_bytes(b"not read")
    assert load_t5_tokenizer(folder)(PROMPTS)["input_ids"] == expected
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has spiece.model and no tokenizer.json"):
        load_t5_tokenizer(folder)
    (folder / "spiece.model").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        load_t5_tokenizer(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"type": "BPE"}, "the model's type is 'BPE'; must be Unigram"),
        ({"type": None}, "the model's type is None; must be Unigram"),
        ({"vocab": [["a", "b"]]}, "transformers cannot read the tokenizer"),
        ({"vocab": 5}, "transformers cannot read the tokenizer"),
    ],
)
def test_other_tokenizers_are_refused(folder, change, message):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        load_t5_tokenizer(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"version https://git-lfs"])
def test_damaged_t5_tokenizer_is_one_line(folder, data):
    (folder / "tokenizer.json").write_bytes(data)
    with pytest.raises(UserError, match=r"tokenizer\.json") as caught:
        load_t5_tokenizer(folder)
    assert "\n" not in str(caught.value)


# --- the conditioning -----------------------------------------------------------------


def unrolled(states_BLD, encoders):
    """Returns the states with every token that the last one stands for."""
    last = np.repeat(states_BLD[:, -1:], encoders.repeats, axis=1)
    return np.concatenate([states_BLD[:, :-1], last], axis=1)


@pytest.mark.parametrize("has_t5", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_conditioning_equals_the_pipelines(has_t5, sd3_folder, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    folder, options = sd3_folder, {}
    if not has_t5:
        folder = write_tiny_sd3(tmp_path / "sd3", t5=False)
        options = {"text_encoder_3": None, "tokenizer_3": None}  # it asks for that
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(str(folder), **options)
    states, negative, pooled, negative_pooled = (
        a.detach().numpy()
        for a in pipe.encode_prompt(
            PROMPTS, None, None, device="cpu", max_sequence_length=T5_LENGTH
        )
    )
    encoders, params, tokenizers = load_text(folder)
    ids = tokenize(tokenizers, encoders, PROMPTS, folder)
    assert ids.shape == (3, *encoders.ids_shape) == (3, 32 + 40 * has_t5)
    assert ids.dtype == np.int32 and tuple(params) == encoders.components
    ours = jax.jit(encoders.encode)(params, ids)
    assert encoders.repeats == (1 if has_t5 else T5_LENGTH)
    assert ours["states"].shape == (3, LENGTH + (T5_LENGTH if has_t5 else 1), 96)
    ours["states"] = unrolled(ours["states"], encoders)
    assert relative_error(ours["states"], states) < TOLERANCE
    assert relative_error(ours["pooled"], pooled) < TOLERANCE
    part = states[:, LENGTH:]  # T5's, of which the CLIPs' may be a small part
    if has_t5:
        assert relative_error(ours["states"][:, LENGTH:], part) < TOLERANCE
        assert relative_error(part[:1], part[1:2]) > 1e-2
    else:
        assert not part.any() and not ours["states"][:, LENGTH:].any()
    clip = states[:, :LENGTH]
    assert relative_error(ours["states"][:, :LENGTH], clip) < TOLERANCE
    assert not clip[:, :, 32 + 48 :].any() and clip[:, :, 32 : 32 + 48].any()
    empty = tokenize(tokenizers, encoders, [""], folder)  # encoded, not zeros
    ours = jax.jit(encoders.encode)(params, empty)
    assert relative_error(unrolled(ours["states"], encoders), negative[:1]) < TOLERANCE
    assert relative_error(ours["pooled"], negative_pooled[:1]) < TOLERANCE


def test_prompts_are_padded_as_each_tokenizer_does(sd3_folder, caplog):
    encoders, _, tokenizers = load_text(sd3_folder)
    ids = tokenize(tokenizers, encoders, ["a", "\ud800"], sd3_folder)
    parts = np.split(ids[0], [16, 32])
    assert [part[-1] for part in parts] == [513, 0, 0]
    assert not caplog.records
    tokenize(tokenizers, encoders, PROMPTS, sd3_folder)
    assert "cut to 40 tokens" in caplog.text and PROMPTS[2] in caplog.text


def test_words_without_a_row_are_refused(sd3_folder):
    encoders, _, tokenizers = load_text(sd3_folder)
    config = dataclasses.replace(encoders.t5.config, vocab_size=100)
    small = dataclasses.replace(encoders, t5=encoders.t5.clone(config=config))
    with pytest.raises(UserError, match="text encoder has 100 rows"):
        tokenize(tokenizers, small, ["a"], sd3_folder)


@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("transformer", {"joint_attention_dim": 64}, "hidden_size=80, but .*dim=64"),
        ("transformer", {"joint_attention_dim": 88}, "d_model=96, but .*dim=88"),
        ("transformer", {"pooled_projection_dim": 57}, "projection_dim=56, but .*=57"),
    ],
)
def test_encoders_that_do_not_fit_are_refused(sd3_folder, part, changes, message):
    encoders, _, _ = load_text(sd3_folder)
    encoders.check_fits(mmdit.build_transformer(TINY_SD3[part]), sd3_folder)
    other = mmdit.build_transformer(TINY_SD3[part] | changes)
    with pytest.raises(UserError, match=message):
        encoders.check_fits(other, sd3_folder)
