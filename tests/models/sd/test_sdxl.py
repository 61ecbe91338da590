# SPDX-License-Identifier: Apache-2.0
"""SDXL: its modules and pictures are PyTorch's; its text, sizes and folder."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_model import relative_error

from gift_jax.models import sd, weights
from gift_jax.models.sd import architectures, stable_diffusion
from gift_jax.models.trainable import select_trainable
from gift_jax.models.weights import TOKEN_TABLE
from gift_jax.runtime.errors import UserError
from gift_jax.sampling import sampler

TOLERANCE = 1e-5
PROMPTS = ["a dog", "!? a longer one"]


@pytest.fixture(scope="module")
def pipeline(tiny_xl_folder):
    """Today's pipeline of PyTorch, in float32."""
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
        str(tiny_xl_folder), add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_unet_equals_pytorch(tiny_xl, pipeline, rng):
    import torch

    z = rng.normal(size=(2, 4, 8, 8)).astype(np.float32)
    t = np.asarray([3, 950], np.int32)
    cond = {
        "states": rng.normal(size=(2, 16, 80)).astype(np.float32),
        "pooled": rng.normal(size=(2, 24)).astype(np.float32),
        "sizes": np.float32([[9, 16, 0, 3, 16, 16], [640, 480, 5, 0, 16, 16]]),
    }
    predict = jax.jit(tiny_xl.network.predict)
    ours, _ = predict(tiny_xl.params["unet"], z, t, cond)
    with torch.no_grad():
        theirs = pipeline.unet(
            torch.tensor(z),
            torch.tensor(t),
            torch.tensor(cond["states"]),
            added_cond_kwargs={
                "text_embeds": torch.tensor(cond["pooled"]),
                "time_ids": torch.tensor(cond["sizes"]),
            },
        ).sample
    assert relative_error(ours, theirs.numpy()) < TOLERANCE
    for name in cond:  # each is read
        other, _ = predict(
            tiny_xl.params["unet"], z, t, cond | {name: cond[name][::-1]}
        )
        assert relative_error(other, ours) > 1e-3, name
    whole = {k: v for k, v in cond.items() if k != "sizes"}
    default, _ = predict(tiny_xl.params["unet"], z, t, whole)
    sizes = np.tile(np.float32([16, 16, 0, 0, 16, 16]), (2, 1))
    given, _ = predict(tiny_xl.params["unet"], z, t, whole | {"sizes": sizes})
    np.testing.assert_allclose(default, given, atol=1e-6)
    bound = jax.jit(lambda p: tiny_xl.network.with_cond(p, cond)(z, t))
    bound = bound(tiny_xl.params["unet"])
    assert relative_error(bound, ours) < TOLERANCE


def test_text_equals_pytorch(tiny_xl, pipeline):
    import torch

    ours = tiny_xl.encode_text(PROMPTS)
    with torch.no_grad():
        theirs = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=True)
    states, zeros, pooled, zero = (a.numpy() for a in theirs)
    assert relative_error(ours["states"], states) < TOLERANCE
    assert relative_error(ours["pooled"], pooled) < TOLERANCE
    assert not zeros.any() and not zero.any()
    empty = tiny_xl.encode_text(["", "a dog"])
    assert not empty["states"][0].any() and not empty["pooled"][0].any()
    assert relative_error(empty["states"][1], states[0]) < TOLERANCE
    ids = tiny_xl.tokenize(PROMPTS)
    assert ids.shape == (2, 2, 16) and ids.shape[1:] == tiny_xl.ids_shape
    assert ids[0, 0, -1] != ids[0, 1, -1]  # each pads with its own token


def test_empty_prompt_is_encoded_where_the_folder_says_so(tiny_xl_folder, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    folder = shutil.copytree(tiny_xl_folder, tmp_path / "xl")
    index = json.loads((folder / "model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = False
    (folder / "model_index.json").write_text(json.dumps(index))
    ours = stable_diffusion.load(folder).encode_text([""])
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(
        str(folder), add_watermarker=False
    )
    _, theirs, _, pooled = pipe.encode_prompt("a", do_classifier_free_guidance=True)
    assert theirs.abs().max() > 0.1
    assert relative_error(ours["states"], theirs.detach().numpy()) < TOLERANCE
    assert relative_error(ours["pooled"], pooled.detach().numpy()) < TOLERANCE


@pytest.mark.parametrize("negative", [None, "red"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_picture_equals_pytorch(tiny_xl, pipeline, negative):
    import torch

    latents = sampler.initial_latents(jax.random.key(1), 2, tiny_xl.latent_shape)
    sample = sampler.make_sampler(tiny_xl, steps=4, guidance=4.0)
    params = tiny_xl.params["unet"], tiny_xl.params["vae"]
    cond, uncond = tiny_xl.encode_text(PROMPTS), tiny_xl.encode_text([negative or ""])
    ours = np.asarray(sample(*params, cond, uncond, latents))
    theirs = pipeline(
        PROMPTS,
        negative_prompt=None if negative is None else [negative] * 2,
        latents=torch.tensor(np.asarray(latents)),
        num_inference_steps=4,
        guidance_scale=4.0,
        output_type="np",
        height=16,
        width=16,
    ).images
    theirs = np.round(theirs * 255).astype(int)
    assert theirs.std() > 5
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_vae_is_float32_where_its_config_asks(tiny_xl_folder, tmp_path):
    model = stable_diffusion.load(tiny_xl_folder, jnp.bfloat16)
    assert model.vae.dtype == jnp.float32 and model.unet.dtype == jnp.bfloat16
    leaves = jax.tree.leaves(model.params["vae"])
    assert {a.dtype for a in leaves} == {jnp.dtype(jnp.float32)}
    folder = shutil.copytree(tiny_xl_folder, tmp_path / "xl")
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(
        json.dumps(config | {"force_upcast": False})
    )
    assert stable_diffusion.load(folder, jnp.bfloat16).vae.dtype == jnp.bfloat16


def test_new_words_are_in_both_encoders(tiny_xl):
    words = tiny_xl.folder.load_tokenizer()
    words.add_tokens(["<a>", "<a>_1"])
    model = tiny_xl.with_tokenizer(words)
    ids = model.tokenize(["<a>"])[0]
    assert (ids >= len(tiny_xl.tokenizer)).sum(axis=1).tolist() == [2, 2]
    rows = {m.config.vocab_size for m in model.text.modules}
    assert rows == {len(tiny_xl.tokenizer) + 2}
    assert len(tiny_xl.tokenizers[1]) == len(tiny_xl.tokenizer)  # as it was


def test_paths_of_both_encoders_are_told_apart(tiny_xl):
    table = flatten_dict(tiny_xl.params["text_encoder_2"], sep="/")[TOKEN_TABLE]
    path = weights.joined_path("text_encoder_2", TOKEN_TABLE)
    model = tiny_xl.updated({path: table + 1})
    for name, moved in (("text_encoder", 0), ("text_encoder_2", 1)):
        new, old = (flatten_dict(m.params[name], sep="/") for m in (model, tiny_xl))
        change = np.abs(new[TOKEN_TABLE] - old[TOKEN_TABLE]).max()
        assert change == pytest.approx(moved, abs=1e-6)


@pytest.mark.slow
def test_parameters_are_those_of_the_published_model():
    configs = architectures.MODELS["sdxl"]
    model = stable_diffusion.abstract_model(configs)
    counts = {
        name: sum(a.size for a in jax.tree.leaves(model.params[name]))
        for name in model.params
    }
    assert counts == {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    }
    assert model.latent_shape == (4, 128, 128)
    trainable, _ = select_trainable(model.params["unet"], "cross_attention")
    assert sum(a.size for a in trainable.values()) == 545_670_400
    assert model.max_length == 77


@pytest.mark.parametrize(
    "index, message",
    [
        ({"text_encoder": [None, None]}, "a refiner is not supported|refiner"),
        ({"text_encoder_2": ["transformers", "T5"]}, "text_encoder_2 is T5; must be"),
        ({"tokenizer_2": [None, None]}, "tokenizer_2 is None; must be"),
        ({"text_encoder_3": ["transformers", "T5"]}, "no Stable Diffusion of two"),
    ],
)
def test_folders_of_other_models_are_refused(tiny_xl_folder, tmp_path, index, message):
    folder = shutil.copytree(tiny_xl_folder, tmp_path / "xl")
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | index))
    with pytest.raises(UserError, match=message):
        stable_diffusion.load(folder)


def test_encoders_that_do_not_fit_the_unet_are_refused(tiny_xl_folder, tmp_path):
    folder = shutil.copytree(tiny_xl_folder, tmp_path / "xl")
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(folder / "text_encoder_2", folder / "text_encoder")
    with pytest.raises(UserError, match="unexpected tensors"):
        stable_diffusion.load(folder)
    assert sd.KINDS["text_encoder_2"].stem == "model"
