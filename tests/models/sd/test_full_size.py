# SPDX-License-Identifier: Apache-2.0
"""SD 1.5 and SD 2.1 against PyTorch: SDXL small always, all of them if slow.

    python -m pytest -m slow -s tests/models/sd/test_full_size.py

Prints the errors reached. The slow ones take two minutes of CPU time each at most,
3.5 GB of disk and 8 GB of memory.
"""

import gc
import shutil

import jax
import numpy as np
import pytest
from full_models import configs
from tiny_model import check_equal

from gift_jax.models import safetensors_io, sd, weight_files, weights
from gift_jax.models.kinds import KINDS
from gift_jax.models.sd import random_weights, stable_diffusion
from gift_jax.models.tokenizer import load_tokenizer

slow = pytest.mark.slow
TEXT = ("small-sd15", "small-sd21", "sd15", "sd21")
OTHERS = ("small-sd15", "small-sd21", "sd15", "sd21", "sdxl")
MODELS = ["small-sdxl", *(pytest.param(name, marks=slow) for name in OTHERS)]
TORCH_CLASS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}


@pytest.fixture
def folder(tmp_path):
    """Where a component is written; removed after, since it may be gigabytes."""
    yield tmp_path / "model"
    shutil.rmtree(tmp_path)
    gc.collect()


def compare(name, kind, folder, ours_of, theirs_of):
    """Writes a component and compares two functions of it: (module, params), (model).

    Ours is computed first and freed, so that one model is in memory at a time.
    """
    import torch

    random_weights.write_component(folder, kind, configs(name)[kind])
    module, params, _ = weights.load_component(folder, kind)
    ours = jax.device_get(jax.jit(lambda p: ours_of(module, p))(params))
    del params
    gc.collect()

    def theirs(dtype):
        library, cls = TORCH_CLASS[kind]
        cls = getattr(__import__(library), cls)
        model = cls.from_pretrained(str(folder))
        model = model if dtype == torch.float32 else model.to(dtype)
        with torch.no_grad():
            found = theirs_of(model, lambda a: torch.tensor(a, dtype=dtype))
        return {k: a.numpy() for k, a in found.items()}

    def theirs_in_double():
        gc.collect()  # the float32 model
        return theirs(torch.float64)

    if kind.startswith("text_encoder"):  # whose causal mask overflows in float64
        theirs_in_double = None
    check_equal(f"{name} {kind}", ours, theirs(torch.float32), theirs_in_double)


@pytest.mark.parametrize("name", MODELS)
def test_unet_equals_pytorch(name, folder, rng):
    torch = pytest.importorskip("torch")
    config = configs(name)["unet"]
    module = sd.build_unet(config)
    shape = (1, 16, config["cross_attention_dim"])
    side = 16 if name.startswith("small") else 32
    z = rng.normal(size=(1, 4, side, side)).astype(np.float32)
    c = rng.normal(size=shape).astype(np.float32)
    t = np.asarray([621], np.int32)
    pooled = rng.normal(size=(1, module.pooled_width)).astype(np.float32)
    sizes = np.float32([[1024, 768, 0, 128, 1024, 1024]])
    added = (pooled, sizes) if module.addition_embed_type else None

    def theirs(unet, put):
        options = {}
        if added:
            keys = {"text_embeds": put(pooled), "time_ids": put(sizes)}
            options["added_cond_kwargs"] = keys
        t_B = torch.tensor(t, dtype=torch.long)
        return {"output": unet(put(z), t_B, put(c), **options).sample}

    compare(
        name,
        "unet",
        folder,
        lambda unet, p: {"output": sd.apply_unet(unet, p, z, t, c, added=added)[0]},
        theirs,
    )


@pytest.mark.parametrize("name", MODELS)
def test_vae_equals_pytorch(name, folder, rng):
    pytest.importorskip("torch")
    side = 4 if name.startswith("small") else 32
    x = rng.uniform(-1, 1, size=(1, 3, 8 * side, 8 * side)).astype(np.float32)
    z = rng.normal(size=(1, 4, side, side)).astype(np.float32)

    def ours(vae, p):
        mean, logvar = sd.apply_vae_encode(vae, p, x)
        image = sd.apply_vae_decode(vae, p, z)
        return {"mean": mean, "logvar": logvar, "image": image}

    def theirs(vae, put):
        posterior = vae.encode(put(x)).latent_dist
        moments = {"mean": posterior.mean, "logvar": posterior.logvar}
        return moments | {"image": vae.decode(put(z)).sample}

    compare(name, "vae", folder, ours, theirs)


SECOND = [
    ("small-sdxl", "text_encoder_2"),
    pytest.param("sdxl", "text_encoder_2", marks=slow),
]


@pytest.mark.parametrize(
    "name, kind",
    [
        ("small-sdxl", "text_encoder"),
        *[pytest.param(name, "text_encoder", marks=slow) for name in TEXT],
        *SECOND,
    ],
)
def test_text_encoder_equals_pytorch(name, kind, folder, rng):
    torch = pytest.importorskip("torch")
    config = configs(name)[kind]
    end, length = config["vocab_size"] - 1, config["max_position_embeddings"]
    pad = 0 if name.endswith("sd21") or kind == "text_encoder_2" else end
    ids = rng.integers(0, end - 1, size=(2, length)).astype(np.int32)
    ids[:, 0], ids[0, 5], ids[0, 6:], ids[1, -1] = end - 1, end, pad, end

    def ours(text, p):
        return sd.apply_text(text, p, ids)._asdict()

    def theirs(text, _):
        ids_BL = torch.tensor(ids, dtype=torch.long)
        out = text(ids_BL, output_hidden_states=True)
        return {
            "last": out.last_hidden_state,
            "pooled": out.pooler_output if kind == "text_encoder" else out.text_embeds,
            "penultimate": out.hidden_states[-2],
        }

    compare(name, kind, folder, ours, theirs)


@pytest.mark.parametrize("name", ["small-sd15", pytest.param("small-sd21", marks=slow)])
def test_whole_folder_equals_pytorch_pipeline(name, folder):
    pytest.importorskip("torch")
    from diffusers import StableDiffusionPipeline

    random_weights.write(folder, configs(name))
    pipeline = StableDiffusionPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    model = stable_diffusion.load(folder)
    assert model.prediction_type == pipeline.scheduler.config.prediction_type
    assert model.latent_shape == (4, 16, 16) and model.image_size == 128
    assert model.scaling_factor == pipeline.vae.config.scaling_factor
    prompts = ["a Dog!", "", "a prompt that will not fit into sixteen tokens"]
    theirs, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    ours = model.encode_text(prompts)["states"]
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=2e-5)


# --- what random_weights.py writes ----------------------------------------------------


def test_tokenizer_has_the_published_ids(tmp_path):
    random_weights.write_tokenizer(tmp_path / "15", size=49408)
    random_weights.write_tokenizer(tmp_path / "21", size=49408, pad_token="!")
    for name, pad in (("15", 49407), ("21", 0)):
        tokenizer = load_tokenizer(tmp_path / name)
        assert len(tokenizer) == 49408
        assert tokenizer.model_max_length == 77
        assert tokenizer.pad_token_id == pad
        ids = tokenizer("Hi <|placeholder 600|>")["input_ids"]
        assert (ids[0], ids[1], ids[-1]) == (49406, 71, 49407)  # h, as published
        assert max(ids[1:-1]) < 512


def read_all(directory, kind):
    found = {}
    for file in weight_files.weight_files(directory, KINDS[kind].stem):
        found |= safetensors_io.read_header(file)
    return {
        name: np.asarray(safetensors_io.read_tensor(name, entry), np.float32)
        for name, entry in found.items()
        if not name.endswith("position_ids")
    }


def test_random_weights_are_the_same_in_every_dtype_and_division(tmp_path):
    config = configs("small-sd21")["text_encoder"]

    def write(name, **options):
        random_weights.write_component(
            tmp_path / name, "text_encoder", config, **options
        )
        return read_all(tmp_path / name, "text_encoder")

    whole = write("whole")
    for options in ({"dtype": "float16"}, {"dtype": "bfloat16"}, {"shard_mib": 0.05}):
        other = write(str(options), **options)
        assert set(other) == set(whole)
        rtol = {"float16": 1e-3, "bfloat16": 8e-3}.get(options.get("dtype"), 0)
        for name in whole:
            np.testing.assert_allclose(other[name], whole[name], rtol, 1e-6)
    shards = list((tmp_path / str({"shard_mib": 0.05})).glob("*.safetensors"))
    assert len(shards) > 1
    assert (write("seed", seed=1)["text_model.final_layer_norm.bias"] != 0).all()
    seeded = read_all(tmp_path / "seed", "text_encoder")
    assert all((seeded[name] != whole[name]).any() for name in whole)


def test_random_folder_refuses_one_that_exists(tmp_path):
    with pytest.raises(ValueError, match="exists; name a new folder"):
        random_weights.write(tmp_path, configs("small-sd15"))
