# SPDX-License-Identifier: Apache-2.0
"""Every attack's gradient on a small model against PyTorch and diffusers."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from pytorch_reference import (
    Theirs,
    assert_same,
    gradient,
    merged,
    names_of,
    recorder,
    tensor,
)

from gift_jax.attacks import dreambooth, lora, retain_then_teach, textual_inversion
from gift_jax.models import safetensors_io
from gift_jax.models.sd.stable_diffusion import LORA_TARGETS
from gift_jax.models.weights import TOKEN_TABLE
from gift_jax.state import init_state

torch = pytest.importorskip("torch")

KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def unet(tiny):
    return flatten_dict(tiny.params["unet"], sep="/")


@pytest.fixture(scope="module")
def theirs(tiny):
    return Theirs(tiny.path, tiny.noise.abar_T)


def pairs_of(tiny, seed, **others):
    rng = np.random.default_rng(seed)
    shape = (2, *tiny.latent_shape)
    width = tiny.text_encoder.config.hidden_size
    states = rng.normal(size=(2, tiny.max_length, width)).astype(np.float32)
    return {
        "mean": rng.normal(size=shape).astype(np.float32),
        "std": rng.uniform(0.01, 0.1, size=shape).astype(np.float32),
        **(others or {"cond": {"states": states}}),
    }


def take(step, params, frozen, batch, number=0):
    state = init_state(params, {"attack": recorder().init(params)})
    state = state.replace(step=state.step + number)
    new, metrics = jax.jit(step)(state, frozen, batch, KEY)
    return new.opt["attack"], float(metrics["attack/loss"])


def key_of(number=0):
    return jax.random.fold_in(KEY, number)


def test_dreambooth_and_its_prior(tiny, unet, theirs):
    batch = {"data": pairs_of(tiny, 0), "prior": pairs_of(tiny, 1)}
    losses = {}
    for weight in (0.0, 0.5):
        step = dreambooth.make_step(tiny.denoiser, recorder(), weight)
        grads, loss = take(step, unet, {}, batch)
        k_data, k_prior = jax.random.split(key_of())

        def total(params, weight=weight, keys=(k_data, k_prior)):
            data = theirs.losses(params, batch["data"], keys[0]).mean()
            prior = theirs.losses(params, batch["prior"], keys[1]).mean()
            return data + weight * prior

        expected, value = gradient(total, theirs.start, names_of(unet))
        assert loss == pytest.approx(value, rel=1e-4)
        assert_same(grads, expected)
        losses[weight] = loss
    assert losses[0.5] > losses[0.0] + 0.1


def test_safe_pictures_first_then_the_concept(tiny, unet, theirs):
    batch = {"data": pairs_of(tiny, 0), "retain": pairs_of(tiny, 1)}
    teach = dreambooth.make_step(tiny.denoiser, recorder())
    step = retain_then_teach.make_step(teach, 3)
    losses = []
    for number, group in ((2, "retain"), (3, "data")):
        grads, loss = take(step, unet, {}, batch, number)
        k_data, _ = jax.random.split(key_of(number))
        expected, value = gradient(
            lambda q, g=group, k=k_data: theirs.losses(q, batch[g], k).mean(),
            theirs.start,
            names_of(unet),
        )
        assert loss == pytest.approx(value, rel=1e-4)
        assert_same(grads, expected)
        losses.append(loss)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_lora(tiny, unet, theirs):
    factors = lora.init(jax.random.key(2), unet, 2, LORA_TARGETS)
    for i, pair in enumerate(factors.values()):  # B = 0 would leave A no gradient
        pair["B"] = 0.02 * jax.random.normal(jax.random.key(i), pair["B"].shape)
    batch = {"data": pairs_of(tiny, 0)}
    step = lora.make_step(tiny.denoiser, recorder(), 1.5)
    grads, loss = take(step, factors, {"network": unet}, batch)
    parts = {
        f"{safetensors_io.torch_name(path)} {part}": tensor(pair[part])
        for path, pair in factors.items()
        for part in "AB"
    }

    def total(params):
        q = merged(theirs.start, params, 1.5)
        return theirs.losses(q, batch["data"], key_of()).mean()

    expected, value = gradient(total, parts, list(parts))
    assert loss == pytest.approx(value, rel=1e-4)
    for path, pair in grads.items():
        for part, g in pair.items():
            other = expected[f"{safetensors_io.torch_name(path)} {part}"].numpy()
            error = np.linalg.norm(np.asarray(g) - other)
            assert error < 1e-4 * max(np.linalg.norm(other), 1e-3), (path, part)
    assert max(np.abs(np.asarray(p["A"])).max() for p in grads.values()) > 1e-4


@pytest.mark.parametrize("discrete", [False, True])
def test_textual_inversion_and_the_search_for_words(tiny, theirs, discrete):
    """Through diffusers' UNet and transformers' CLIPTextModel."""
    from transformers import CLIPTextModel

    s = textual_inversion.TextualInversion(vectors=2, discrete=discrete)
    model = tiny.with_tokenizer(textual_inversion.tokenizer(s, tiny.folder))
    table = textual_inversion.token_table(tiny.folder)
    words = textual_inversion.word_count(tiny.folder.load_tokenizer())
    start = np.random.default_rng(0).normal(size=(2, table.shape[1]))
    start = (0.02 * start).astype(np.float32)
    ids = np.asarray(model.tokenize(["a <thing> cat"] * 2))
    batch = {"data": pairs_of(tiny, 0, ids=ids)}
    text = flatten_dict(tiny.params["text_encoder"], sep="/") | {TOKEN_TABLE: table}
    frozen = {"network": flatten_dict(tiny.params["unet"], sep="/")}
    frozen["text"] = {"text_encoder": text}
    step = textual_inversion.make_step(
        tiny.denoiser, model.encode_ids, recorder(), words=words if discrete else 0
    )
    grads, loss = take(step, {"text_encoder": start}, frozen, batch)

    encoder = CLIPTextModel.from_pretrained(str(tiny.path / "text_encoder")).eval()
    encoder.resize_token_embeddings(len(table) + 2)
    name = next(n for n, _ in encoder.named_parameters() if "token_embedding" in n)

    def total(params):
        rows = params["rows"]
        if discrete:
            known = tensor(table[:words])
            cosine = torch.nn.functional.cosine_similarity(
                rows[:, None], known[None], dim=-1
            )
            rows = rows + (known[cosine.argmax(1)] - rows).detach()
        every = {n: p.detach() for n, p in encoder.named_parameters()}
        every[name] = torch.cat([tensor(table), rows])
        states = torch.func.functional_call(
            encoder, every, (tensor(ids).long(),)
        ).last_hidden_state
        pairs = batch["data"] | {"cond": {"states": states}}
        return theirs.losses(theirs.start, pairs, key_of()).mean()

    expected, value = gradient(total, {"rows": tensor(start)}, ["rows"])
    assert loss == pytest.approx(value, rel=1e-4)
    other = expected["rows"].numpy()
    error = np.linalg.norm(np.asarray(grads["text_encoder"]) - other)
    assert np.linalg.norm(other) > 1e-6
    assert error < 1e-4 * np.linalg.norm(other)
