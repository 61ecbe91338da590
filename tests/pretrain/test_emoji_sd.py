# SPDX-License-Identifier: Apache-2.0
"""The embedded model and its judge, as shipped."""

import json

import jax
import numpy as np
import pytest
from tiny_model import relative_error

from gift_jax import generate
from gift_jax.data import captions
from gift_jax.data.images import read_image
from gift_jax.data.sources import emoji
from gift_jax.metrics import judge
from gift_jax.models import exports, sd
from gift_jax.models.load import EMBEDDED, load_model
from gift_jax.models.trainable import select_trainable
from gift_jax.sampling import sampler

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model():
    return load_model("emoji-sd")


@pytest.fixture(scope="module")
def the_judge():
    return judge.load()


def test_it_is_small_and_whole():
    files = [p for p in EMBEDDED.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 30e6
    index = json.loads((EMBEDDED / "model_index.json").read_text())
    for name in ("scheduler", "text_encoder", "tokenizer", "unet", "vae"):
        assert index[name][0] and (EMBEDDED / name).is_dir()
    assert not [p for p in files if p.suffix in (".bin", ".ckpt", ".pt")]


@pytest.mark.slow
def test_every_part_equals_pytorch(model, rng):
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    def theirs(cls, name):  # in float64: its own float32 decoder is 1.7e-5 off that
        part = cls.from_pretrained(str(EMBEDDED / name)).eval()
        return part.float() if name == "text_encoder" else part.double()

    def double(array):
        return torch.tensor(np.asarray(array), dtype=torch.float64)

    ids = model.tokenize(["a noto emoji of a bomb", "sks"])
    text = sd.apply_text(model.text_encoder, model.params["text_encoder"], ids).last
    z = rng.normal(size=(2, *model.latent_shape)).astype(np.float32)
    t = np.asarray([3, 987], np.int32)
    unet = jax.jit(lambda p: sd.apply_unet(model.unet, p, z, t, text)[0])
    x = rng.uniform(-1, 1, size=(2, 3, 64, 64)).astype(np.float32)
    encode = jax.jit(lambda p: sd.apply_vae_encode(model.vae, p, x))
    decode = jax.jit(lambda p: sd.apply_vae_decode(model.vae, p, z))
    with torch.no_grad():
        tower = theirs(CLIPTextModel, "text_encoder")
        hidden = tower(torch.tensor(np.asarray(ids), dtype=torch.long))
        assert relative_error(text, hidden.last_hidden_state) < TOLERANCE
        noise = theirs(UNet2DConditionModel, "unet")(
            double(z), torch.tensor(t), double(text)
        )
        assert relative_error(unet(model.params["unet"]), noise.sample) < TOLERANCE
        vae = theirs(AutoencoderKL, "vae")
        mean, logvar = encode(model.params["vae"])
        posterior = vae.encode(double(x)).latent_dist
        assert relative_error(mean, posterior.mean) < TOLERANCE
        assert relative_error(logvar, posterior.logvar) < TOLERANCE
        image = vae.decode(double(z)).sample
        assert relative_error(decode(model.params["vae"]), image) < TOLERANCE


def test_pytorch_draws_the_exported_model_alike(model, tmp_path):
    torch = pytest.importorskip("torch")
    from diffusers import StableDiffusionPipeline

    trainable, frozen = select_trainable(model.params["unet"], "cross_attention")
    changed = {path: np.float16(1.05) * array for path, array in trainable.items()}
    exports.export(EMBEDDED, changed, tmp_path / "export")
    exported = load_model(str(tmp_path / "export"))
    pipeline = StableDiffusionPipeline.from_pretrained(str(tmp_path / "export"))
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a noto emoji of a bomb", "a fluent emoji of a cat face"]
    latents = sampler.initial_latents(jax.random.key(3), 2, model.latent_shape)
    theirs = pipeline(
        prompts,
        latents=torch.tensor(np.asarray(latents)),
        guidance_scale=3.0,
        num_inference_steps=10,
        output_type="pil",
    ).images
    theirs = np.stack([np.asarray(image) for image in theirs]).astype(int)

    def ours(model):
        sample = sampler.make_sampler(model, None, 10, 3.0)
        cond = model.encode_text(prompts)
        uncond = model.encode_text([""])
        params = model.params
        images = sample(params["unet"], params["vae"], cond, uncond, latents)
        return np.asarray(images).astype(int)

    assert np.abs(ours(model) - theirs).mean() > 1  # another model draws otherwise
    assert np.abs(ours(exported) - theirs).mean() <= 1
    after = select_trainable(exported.params["unet"], "cross_attention")[1]
    for path, array in frozen.items():
        np.testing.assert_array_equal(array, after[path])


def test_the_judge_names_real_pictures(the_judge):
    pictures = emoji.load()
    rows = np.flatnonzero(~pictures.held_out)[::20]
    concept, style = the_judge.name(pictures.images[rows])
    assert np.mean(concept == pictures.concept_ids[rows]) > 0.95
    assert np.mean(style == pictures.style_ids[rows]) > 0.95
    blank = np.full((1, 64, 64, 3), 255, np.uint8)
    named, _ = the_judge.name(np.repeat(blank, 4, axis=0))
    assert len(set(named)) == 1


def test_it_draws_what_is_asked_for(the_judge, tmp_path):
    names = ("bomb", "cat face", "rose", "pill")
    assert set(names) <= set(emoji.known_concepts())
    flags = ["--model=emoji-sd", f"--out={tmp_path}", "--num=3", "--steps=20"]
    flags += ["--guidance=3"]
    for i, name in enumerate(names):
        flags += ["--prompt", captions.caption(name, emoji.STYLES[i])]
    assert generate.main(flags) == 0
    files = sorted(tmp_path.glob("0*.png"))
    images = np.stack([read_image(file, 64) for file in files])
    concept, style = the_judge.name(images)
    wanted = np.repeat([the_judge.concepts.index(n) for n in names], 3)
    assert np.mean(concept == wanted) >= 0.5  # chance: 0.002
    assert np.mean(style == np.repeat(np.arange(4), 3)) >= 0.7  # chance: 0.17
