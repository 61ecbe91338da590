# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 as a family: folders, sizes, what is refused, pictures."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_sd3 import write_tiny_sd3

from gift_jax import convert
from gift_jax.models import exports, load
from gift_jax.models.mmdit import stable_diffusion_3
from gift_jax.models.sd import pytorch
from gift_jax.runtime.errors import UserError, VerificationError
from gift_jax.sampling import sampler


@pytest.fixture(scope="module")
def folders(sd3_folder, tmp_path_factory):
    """{has T5: a tiny folder}; read only."""
    without = tmp_path_factory.mktemp("tiny") / "without_t5"
    return {True: sd3_folder, False: write_tiny_sd3(without, t5=False)}


@pytest.fixture
def changed(sd3_folder, tmp_path):
    """(a file in JSON, its new keys) -> a copy of the folder."""

    def call(name, keys):
        folder = shutil.copytree(sd3_folder, tmp_path / "sd3", dirs_exist_ok=True)
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | keys))
        return folder

    return call


# --- loading --------------------------------------------------------------------------


@pytest.mark.parametrize("has_t5", [True, False])
def test_folder_says_what_it_is(folders, has_t5):
    model = load.load_model(str(folders[has_t5]))
    assert isinstance(model, stable_diffusion_3.StableDiffusion3)
    assert model.latent_shape == (16, 8, 8) and model.image_size == 16
    assert model.text.clip_length == 16 and len(model.tokenizers) == 2 + has_t5
    assert model.ids_shape == model.tokenize(["a"])[0].shape == (32 + 256 * has_t5,)
    scale = model.latent_scale
    np.testing.assert_array_equal(scale, np.float32([1.5305, 0.0609]))
    names = ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"]
    assert list(model.params) == names[: 4 + has_t5]


def test_shapes_alone_are_those_of_the_folder(sd3_folder):
    name = str(sd3_folder)
    model, abstract = load.load_model(name), load.abstract_model(name)
    for name, params in model.params.items():
        ours = {p: a.shape for p, a in flatten_dict(abstract.params[name]).items()}
        assert ours == {p: a.shape for p, a in flatten_dict(params).items()}, name
    assert abstract.ids_shape == model.ids_shape
    assert abstract.network == model.network


@pytest.mark.parametrize("cls", ["Img2Img", "Inpaint"])
def test_other_pipelines_folders_are_the_same(changed, cls):
    folder = changed(
        "model_index.json", {"_class_name": f"StableDiffusion3{cls}Pipeline"}
    )
    assert load.family_of(folder) is stable_diffusion_3.FAMILY


def test_published_models_need_no_files(monkeypatch):
    monkeypatch.setattr(load.hub, "fetch", None)
    model = load.abstract_model("stabilityai/stable-diffusion-3.5-medium", "bfloat16")
    assert model.latent_shape == (16, 128, 128) and model.image_size == 1024
    assert model.ids_shape == (77 + 77 + 256,)
    assert model.module.dual_attention_layers == tuple(range(13))
    assert {str(a.dtype) for a in jax.tree.leaves(model.params["vae"])} == {"float32"}


@pytest.mark.parametrize(
    "resolution, message",
    [
        (18, "resolution=18 must be a multiple of 4, as a patch's side is; try 16"),
        (44, "resolution=44 is above the 40 pixels that the transformer's pos_embed"),
    ],
)
def test_sizes_without_places_are_refused(sd3_folder, resolution, message):
    assert load.abstract_model(str(sd3_folder), resolution=40).image_size == 40
    with pytest.raises(UserError, match=message):
        load.abstract_model(str(sd3_folder), resolution=resolution)


INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
MISFITS = [  # (file, its new keys, message)
    (INDEX, dict(text_encoder=["transformers", "CLIPTextModel"]), "WithProjection"),
    (INDEX, dict(unet=["diffusers", "X"]), "'unet', which no Stable Diffusion 3 has"),
    (INDEX, dict(scheduler=["diffusers", "DDIMScheduler"]), "'DDIMScheduler' is not"),
    (SCHEDULER, dict(use_karras_sigmas=True), "use_karras_sigmas=True"),
    ("transformer/config.json", dict(sample_size=7), "multiple of patch_size=2"),
    ("transformer/config.json", dict(sample_size=22), "above the 40 pixels"),
    ("vae/config.json", dict(shift_factor=None), "shift_factor is None, which PyTo"),
    ("vae/config.json", dict(latent_channels=4), "4, but transformer in and out"),
    ("text_encoder/config.json", dict(projection_dim=8), "_dim=32, but transformer"),
]


@pytest.mark.parametrize("file, keys, message", MISFITS)
def test_what_does_not_fit_is_one_line(changed, file, keys, message):
    folder = changed(file, keys)
    with pytest.raises(UserError, match=message) as caught:
        read = stable_diffusion_3.read_configs(folder)
        stable_diffusion_3._layout(folder).check(
            stable_diffusion_3.class_names(folder), folder / "model_index.json"
        )
        scheduler = stable_diffusion_3.parts.read_scheduler(folder)
        stable_diffusion_3.abstract_model(read | {"scheduler": scheduler})
    assert "\n" not in str(caught.value)


def test_t5s_tokenizer_alone_is_not_read(folders, tmp_path):
    folder = shutil.copytree(folders[False], tmp_path / "sd3")
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    index["tokenizer_3"] = ["transformers", "T5TokenizerFast"]
    file.write_text(json.dumps(index))
    assert len(stable_diffusion_3.load(folder).tokenizers) == 2


# --- files ----------------------------------------------------------------------------


def assert_same_files(folder, other):
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 12
    for file in files:
        copy = other / file.relative_to(folder)
        assert copy.read_bytes() == file.read_bytes(), file


@pytest.mark.parametrize("has_t5", [True, False])
def test_round_trip_is_byte_for_byte(folders, has_t5, tmp_path):
    folder = folders[has_t5]
    argv = ["from-diffusers", "--model", str(folder)]
    assert convert.main([*argv, "--out", str(tmp_path / "orbax")]) == 0
    argv = ["to-diffusers", "--checkpoint", str(tmp_path / "orbax")]
    assert convert.main([*argv, "--out", str(tmp_path / "back")]) == 0
    assert_same_files(folder, tmp_path / "back")
    exports.export(folder, {}, tmp_path / "export")
    assert_same_files(folder, tmp_path / "export")


def test_every_component_can_change(sd3_folder, tmp_path):
    """Of the first text encoder its projection, too, which elsewhere it has not."""
    model = load.load_model(str(sd3_folder))
    paths = [
        "transformer_blocks_0/attn/add_k_proj/kernel",
        "text_projection/kernel",
        "text_encoder_2/text_projection/kernel",
        "text_encoder_3/encoder/block_0/layer_0/SelfAttention/q/kernel",
    ]
    arrays = {}
    for path in paths:
        top = path.split("/")[0]
        component = top if top in model.params else "text_encoder"
        component = "transformer" if top.startswith("transformer") else component
        rest = path.removeprefix(f"{component}/")
        array = model.folder.float32_params(component, [rest])[rest]
        arrays[path] = np.asarray(array) + 1
    exports.export(sd3_folder, arrays, tmp_path / "export")
    new, updated = load.load_model(str(tmp_path / "export")), model.updated(arrays)
    for name, params in new.params.items():
        old = flatten_dict(model.params[name], sep="/")
        flat, ours = (flatten_dict(p, sep="/") for p in (params, updated.params[name]))
        moved = [path for path in flat if np.abs(flat[path] - old[path]).max() > 0]
        assert len(moved) == (name != "vae"), name
        for path in moved:
            np.testing.assert_allclose(flat[path], old[path] + 1, rtol=1e-6)
            np.testing.assert_array_equal(flat[path], ours[path])


# --- pictures -------------------------------------------------------------------------


@pytest.mark.parametrize("has_t5", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_pictures_equal_pytorchs(folders, has_t5):
    """From the same latents, guided, at another size than the model's own."""
    diffusers = pytest.importorskip("diffusers")
    import torch

    none = {} if has_t5 else dict.fromkeys(("text_encoder_3", "tokenizer_3"))
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
        str(folders[has_t5]), **none
    )
    pipe.set_progress_bar_config(disable=True)
    model = load.load_model(str(folders[has_t5]), resolution=24)
    key = jax.random.key(0)
    latents = sampler.initial_latents(key, 2, model.latent_shape)
    prompts = ["a dog", "a photo of a cat"]
    images = [
        pipe(
            prompt,
            num_inference_steps=3,
            guidance_scale=4.0,
            latents=torch.tensor(np.asarray(z)[None]),
            height=24,
            width=24,
            output_type="np",
        ).images[0]
        for prompt, z in zip(prompts, latents, strict=True)
    ]
    sample = sampler.make_sampler(model, steps=3, guidance=4.0)
    text = [model.encode_text(some) for some in (prompts, [""])]
    ours = sample(model.denoiser_params, model.vae_params, *text, latents)
    difference = np.abs(np.asarray(ours) - 255 * np.stack(images))
    assert difference.max() <= 1
    assert np.std(images) > 0.1 and np.abs(images[0] - images[1]).mean() > 0.05


@pytest.mark.parametrize("has_t5", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_half_precision_is_verified(folders, has_t5, tmp_path, capsys):
    pytest.importorskip("diffusers")
    exports.export(folders[has_t5], {}, tmp_path / "export", dtype="F16")
    assert convert.main(["verify", f"--model={tmp_path / 'export'}"]) == 0
    line = capsys.readouterr().out
    assert f"verified: {4 + has_t5} components load in diffusers" in line
    assert re.search(r"pictures differ by at most [012]/255\n$", line), line


def test_a_transformer_that_pytorch_reads_otherwise(folders, monkeypatch):
    pytest.importorskip("diffusers")
    read = pytorch.safetensors_io.read_tensor

    def turned(name, entry):
        array = read(name, entry)
        return array[::-1] if name == "context_embedder.weight" else array

    monkeypatch.setattr(pytorch.safetensors_io, "read_tensor", turned)
    message = r"context_embedder.weight is \[32, 96\] of other values than PyTorch"
    with pytest.raises(VerificationError, match=message):
        convert.main(["verify", f"--model={folders[False]}"])
