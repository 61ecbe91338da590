# SPDX-License-Identifier: Apache-2.0
"""FLUX.1 as a family: folders, what is refused, what trains, schedules, pictures."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_flux import NAMES, build

from gift_jax import convert
from gift_jax.models import exports, flux, kinds, load
from gift_jax.models.flux import architectures, flux_1, trainable
from gift_jax.models.params import parameter_shapes
from gift_jax.models.trainable import select_trainable
from gift_jax.runtime.errors import UserError
from gift_jax.sampling import sampler, schedules
from gift_jax.training.sharding import partition_spec

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and peft's own

# --- loading --------------------------------------------------------------------------


def test_folder_says_what_it_is(flux_folders):
    model = load.load_model(str(flux_folders["dev"]))
    assert isinstance(model, flux_1.Flux1) and model.module.guidance_embeds
    assert model.latent_shape == (16, 8, 8) and model.image_size == 16
    assert model.ids_shape == model.tokenize(["a"])[0].shape == (16 + 512,)
    np.testing.assert_array_equal(model.latent_scale, np.float32([0.3611, 0.1159]))
    abstract = load.abstract_model(str(flux_folders["dev"]))
    assert abstract.network == model.network and abstract.ids_shape == model.ids_shape
    for name, params in model.params.items():
        ours = {p: a.shape for p, a in flatten_dict(abstract.params[name]).items()}
        assert ours == {p: a.shape for p, a in flatten_dict(params).items()}, name


def test_published_models_need_no_files(monkeypatch):
    monkeypatch.setattr(load.hub, "fetch", None)
    name = "black-forest-labs/FLUX.1-dev"
    assert set(architectures.MODELS) == {name, "black-forest-labs/FLUX.1-schnell"}
    model = load.abstract_model(name, "bfloat16")
    assert model.latent_shape == (16, 128, 128) and model.image_size == 1024
    assert model.ids_shape == (77 + 512,)
    counts = {
        part: sum(a.size for a in jax.tree.leaves(params))
        for part, params in model.params.items()
    }
    assert counts == {
        "transformer": 11_901_408_320,
        "vae": 83_819_683,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
    }
    for published in architectures.MODELS.values():
        for folder, kind in flux.KIND_OF.items():
            kinds.check_config(kind, json.loads(json.dumps(published[folder])), folder)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_byte_for_byte(flux_folders, name, tmp_path):
    folder = flux_folders[name]
    argv = ["from-diffusers", "--model", str(folder)]
    assert convert.main([*argv, "--out", str(tmp_path / "orbax")]) == 0
    argv = ["to-diffusers", "--checkpoint", str(tmp_path / "orbax")]
    assert convert.main([*argv, "--out", str(tmp_path / "back")]) == 0
    exports.export(folder, {}, tmp_path / "export")
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 12
    for file in files:
        for out in ("back", "export"):
            copy = tmp_path / out / file.relative_to(folder)
            assert copy.read_bytes() == file.read_bytes(), copy


TRANSFORMER = "transformer/config.json"
MISFITS = [  # (file, its new keys, message)
    (TRANSFORMER, dict(in_channels=32), "packed=64, but transformer in_channels=32"),
    (TRANSFORMER, dict(in_channels=6), "in_channels=6 must divide by 4"),
    (TRANSFORMER, dict(out_channels=32), "in_channels=64 must divide by 4, and be out"),
    (TRANSFORMER, dict(patch_size=2), "patch_size=2 is not supported; must be 1"),
    (TRANSFORMER, dict(axes_dims_rope=[4, 4, 4]), "must be even, and 16 in sum"),
    (TRANSFORMER, dict(joint_layers=2), "joint_layers=2 is of no known key"),
    (TRANSFORMER, dict(pooled_projection_dim=8), "_size=32, but transformer pooled_"),
    (TRANSFORMER, dict(joint_attention_dim=8), "d_model=96, but transformer joint_a"),
    ("vae/config.json", dict(shift_factor=None), "shift_factor is None, which PyTorch"),
    (
        "vae/config.json",
        dict(sample_size=18),
        "must be a multiple of 4, as 2x2 latents",
    ),
    ("scheduler/scheduler_config.json", dict(max_image_seq_len=9), "must be above 256"),
    ("scheduler/scheduler_config.json", dict(invert_sigmas=True), "invert_sigmas=True"),
    (
        "model_index.json",
        dict(scheduler=["diffusers", "FlowMatchHeunDiscreteScheduler"]),
        "'FlowMatchHeunDiscreteScheduler' must be FlowMatchEulerDiscreteScheduler",
    ),
]


@pytest.mark.parametrize("file, keys, message", MISFITS)
def test_what_does_not_fit_is_one_line(flux_folders, tmp_path, file, keys, message):
    folder = shutil.copytree(flux_folders["dev"], tmp_path / "flux")
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    with pytest.raises(UserError, match=message) as caught:
        load.abstract_model(str(folder))
    assert "\n" not in str(caught.value)


# --- what trains, and where -----------------------------------------------------------

_TEXT = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
_TEXT |= {"norm_added_q", "norm_added_k"}
_IMAGE = {"to_q", "to_k", "to_v", "to_out_0", "norm_q", "norm_k"}
_SINGLE = _IMAGE - {"to_out_0"}
EXPECTED = {  # layers of each joint block's attention, of each single block's
    "cross_attention": (_TEXT, set()),
    "text_stream": (_TEXT, set()),
    "image_stream": (_IMAGE, set()),
    "attention": (_TEXT | _IMAGE, _SINGLE),
}


def test_rules_select_their_layers():
    params = build()[1]
    assert set(trainable.TRAINABLE_SETS) == {*EXPECTED, "all"}
    assert not select_trainable(params, "all", trainable.TRAINABLE_SETS)[1]
    for rule, expected in EXPECTED.items():
        chosen, _ = select_trainable(params, rule, trainable.TRAINABLE_SETS)
        layers = {path.rsplit("/", 1)[0] for path in chosen}
        joint, single = expected
        assert layers == {
            *(f"transformer_blocks_{i}/attn/{name}" for i in (0, 1) for name in joint),
            *(
                f"single_transformer_blocks_{i}/attn/{name}"
                for i in (0, 1)
                for name in single
            ),
        }, rule


def test_lora_goes_where_diffusers_example_puts_it():
    flat = flatten_dict(build()[1], sep="/")
    paths = [path for path in flat if re.search(trainable.LORA_TARGETS, path)]
    targets = ["attn/to_k", "attn/to_q", "attn/to_v", "attn/to_out_0"]
    targets += ["attn/add_k_proj", "attn/add_q_proj", "attn/add_v_proj"]
    targets += ["attn/to_add_out", "ff/net_0/proj", "ff/net_2"]
    targets += ["ff_context/net_0/proj", "ff_context/net_2"]
    ends = tuple(f"/{target}/kernel" for target in targets)
    assert set(paths) == {path for path in flat if path.endswith(ends)}
    assert len(paths) == 2 * 12 + 2 * 3


def test_layers_that_follow_each_other_are_divided_alike():
    shapes = flatten_dict(parameter_shapes(build()[0]), sep="/")
    sizes, rules = {"fsdp": 2, "tensor": 2}, trainable.PARTITION_RULES
    for path, axes in {
        "transformer_blocks_0/attn/add_q_proj": ("fsdp", "tensor"),
        "transformer_blocks_0/ff/net_2": ("tensor", "fsdp"),
        "single_transformer_blocks_0/proj_mlp": ("fsdp", "tensor"),
        "single_transformer_blocks_0/proj_out": ("tensor", "fsdp"),
    }.items():
        path = f"{path}/kernel"
        assert tuple(partition_spec(path, shapes[path].shape, sizes, rules)) == axes


# --- schedules and pictures -----------------------------------------------------------


@pytest.mark.parametrize("shift", ["exponential", "linear"])
@pytest.mark.parametrize("name", NAMES)
def test_levels_equal_pytorchs_bit_for_bit(name, shift):
    """Of training without a dynamic shift, of drawing with that of the pipeline."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = architectures.SCHEDULER | {"time_shift_type": shift}
    config |= {"max_shift": 1.2} | NAMES[name]["scheduler"]
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    tables = []
    for tokens in (16, 1024, 4096):
        ours = config | {flux_1.flow_schedule.TOKENS: tokens}
        noise = flux_1.flow_schedule.noise_process(ours)
        np.testing.assert_array_equal(noise.sigma_T, theirs.sigmas[:1000])
        for steps in (1, 4, 28):
            scheduler = type(theirs).from_config(config)
            mu = calculate_shift(tokens, 256, 4096, 0.5, 1.2)
            sigmas = np.linspace(1.0, 1 / steps, steps)
            scheduler.set_timesteps(sigmas=sigmas, mu=mu)
            table = schedules.schedule(ours, "", steps)
            np.testing.assert_array_equal(table.t, scheduler.timesteps)
        tables.append(table.t)
    assert np.array_equal(tables[0], tables[2]) == (name == "schnell")


def test_pictures_equal_pytorchs(flux_folders):
    """From the same latents, guided, at another size than the model's own."""
    diffusers = pytest.importorskip("diffusers")
    import torch

    pipe = diffusers.FluxPipeline.from_pretrained(str(flux_folders["dev"]))
    pipe.set_progress_bar_config(disable=True)
    model = load.load_model(str(flux_folders["dev"]), resolution=24)
    latents = sampler.initial_latents(jax.random.key(0), 1, model.latent_shape)
    z = torch.tensor(np.asarray(latents))
    image = pipe(
        "a dog",
        negative_prompt="",
        num_inference_steps=2,
        true_cfg_scale=4.0,
        latents=pipe._pack_latents(z, *z.shape),
        height=24,
        width=24,
        output_type="np",
    ).images
    sample = sampler.make_sampler(model, steps=2, guidance=4.0)
    text = [model.encode_text([prompt]) for prompt in ("a dog", "")]
    ours = sample(model.denoiser_params, model.vae_params, *text, latents)
    assert np.abs(np.asarray(ours) - 255 * image).max() <= 1
    assert np.std(image) > 0.05


def test_folder_is_verified(flux_folders, capsys):
    """With its picture, of the model's own size and without a distilled guidance."""
    pytest.importorskip("diffusers")
    assert convert.main(["verify", f"--model={flux_folders['schnell']}"]) == 0
    line = capsys.readouterr().out
    assert "verified: 4 components load in diffusers" in line
    assert re.search(r"pictures differ by at most [01]/255\n$", line), line
