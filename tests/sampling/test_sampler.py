# SPDX-License-Identifier: Apache-2.0
"""The sampler against PyTorch's StableDiffusionPipeline, and its own promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import relative_error

from gift_jax.models import exports
from gift_jax.models.trainable import select_trainable
from gift_jax.runtime.errors import UserError
from gift_jax.sampling import sampler, schedules
from gift_jax.state import merge_params

PROMPTS = ["a red dog", "two birds"]
SD15 = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
PNDM = {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
VELOCITY = {"prediction_type": "v_prediction"}
CASES = {  # name: (our scheduler, steps, config of the folder); five UNet calls each
    "ddim": ("ddim", 5, SD15),
    "ddim-to-one": ("ddim", 5, {"clip_sample": False, "set_alpha_to_one": True}),
    "ddim-clip": ("ddim", 5, {"clip_sample": True, "clip_sample_range": 0.5}),
    "ddim-trailing": ("ddim", 5, SD15 | {"timestep_spacing": "trailing"}),
    "ddim-linspace": ("ddim", 5, SD15 | {"timestep_spacing": "linspace"}),
    "ddim-velocity": ("ddim", 5, SD15 | VELOCITY),
    "ddim-zero-snr": ("ddim", 5, SD15 | VELOCITY | ZERO_SNR),
    "pndm": ("pndm", 4, PNDM),
    "pndm-to-one": ("pndm", 4, {"skip_prk_steps": True, "set_alpha_to_one": True}),
    "pndm-velocity": ("pndm", 4, PNDM | VELOCITY),
    "pndm-linear": ("pndm", 4, PNDM | {"beta_schedule": "linear"}),
    "dpm": ("dpmsolver++", 5, {}),
    "dpm-leading": (
        "dpmsolver++",
        5,
        {"timestep_spacing": "leading", "steps_offset": 1, "solver_type": "heun"},
    ),
    "dpm-sigma-min": ("dpmsolver++", 5, {"final_sigmas_type": "sigma_min"}),
    "dpm-velocity": ("dpmsolver++", 5, VELOCITY | {"lower_order_final": False}),
    "dpm-zero-snr": ("dpmsolver++", 5, VELOCITY | ZERO_SNR),
    "euler-clip": ("euler", 5, {"clip_sample": True, "timestep_spacing": "leading"}),
    "heun": ("heun", 3, {"use_karras_sigmas": True}),
    "unipc": ("unipc", 5, {"solver_order": 3}),
    "dpm-cosine": (
        "dpmsolver++",
        5,
        {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"},
    ),
}
TORCH_CLASS = {kind.name: kind.class_name for kind in schedules.DDPM.schedulers}


def scheduler_config(name):
    ours, _, changes = CASES[name]
    base = {
        "_class_name": TORCH_CLASS[ours],
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
    }
    return base | changes


@pytest.fixture(scope="module")
def pytorch_pipeline(tiny_folder):
    """PyTorch's own pipeline of the tiny folder."""
    pytest.importorskip("torch")
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(str(tiny_folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pytorch_draws(pipeline, config, latents, **kwargs):
    import diffusers
    import torch

    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    parts = pipeline.components | {"scheduler": scheduler}  # which it corrects
    pipeline = type(pipeline)(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.tensor(np.asarray(latents))
    return pipeline(PROMPTS, latents=latents, guidance_scale=4.0, **kwargs).images


def ours_draw(model, name, latents, decode):
    scheduler, steps, _ = CASES[name]
    model = model.replace(scheduler_config=scheduler_config(name))
    sample = sampler.make_sampler(model, scheduler, steps, 4.0, decode)
    cond = model.encode_text(PROMPTS)
    uncond = model.encode_text([""])
    return sample(model.params["unet"], model.params["vae"], cond, uncond, latents)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_latents_equal_pytorch_pipeline(pytorch_pipeline, tiny, name):
    latents = sampler.initial_latents(jax.random.key(1), 2, tiny.latent_shape)
    theirs = pytorch_draws(
        pytorch_pipeline,
        scheduler_config(name),
        latents,
        num_inference_steps=CASES[name][1],
        output_type="latent",
    ).numpy()
    ours = np.asarray(ours_draw(tiny, name, latents, decode=False))
    assert np.abs(theirs - np.asarray(latents)).max() > 0.1  # something was done
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-4


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["ddim", "pndm", "euler-clip", "heun", "unipc"])
def test_images_equal_pytorch_pipeline(pytorch_pipeline, tiny, name):
    latents = sampler.initial_latents(jax.random.key(2), 2, tiny.latent_shape)
    theirs = pytorch_draws(
        pytorch_pipeline,
        scheduler_config(name),
        latents,
        num_inference_steps=CASES[name][1],
        output_type="pil",
    )
    theirs = np.stack([np.asarray(image) for image in theirs]).astype(int)
    ours = np.asarray(ours_draw(tiny, name, latents, decode=True)).astype(int)
    assert theirs.std() > 10  # a picture, not a flat or saturated field
    assert np.abs(ours - theirs).max() <= 1


@pytest.fixture(scope="module")
def drawn(tiny):
    """A DDIM sampler of five steps and its arguments but the last."""
    cond = tiny.encode_text(PROMPTS)
    uncond = tiny.encode_text([""])
    sample = sampler.make_sampler(tiny, "ddim", 5, 4.0)
    params = tiny.params
    return lambda z: sample(params["unet"], params["vae"], cond, uncond, z)


def test_a_key_draws_each_example_by_its_index(tiny, drawn):
    key = jax.random.key(3)
    latents = sampler.initial_latents(key, 3, tiny.latent_shape)
    assert np.abs(latents[0] - latents[1]).max() > 0.1
    later = sampler.initial_latents(key, 1, tiny.latent_shape, first=2)
    np.testing.assert_array_equal(later[0], latents[2])
    images = drawn(key)
    assert images.shape == (2, 16, 16, 3) and images.dtype == jnp.uint8
    np.testing.assert_array_equal(images, drawn(latents[:2]))
    assert (images != drawn(jax.random.key(4))).any()


def test_initial_latents_are_standard_normal():
    latents = sampler.initial_latents(jax.random.key(0), 64, (4, 16, 16))
    assert abs(float(latents.mean())) < 0.01
    assert abs(float(latents.std()) - 1) < 0.01


def test_guidance_one_ignores_the_unconditional_states(tiny):
    cond = tiny.encode_text(PROMPTS)
    key, params = jax.random.key(0), tiny.params["unet"]

    def draw(guidance, uncond):
        sample = sampler.make_sampler(tiny, "ddim", 5, guidance, decode=False)
        return np.asarray(sample(params, None, cond, uncond, key))

    alone = draw(1.0, None)
    np.testing.assert_array_equal(draw(1.0, tiny.encode_text(PROMPTS[1:])), alone)
    # guided by itself, a prompt is not guided; guided by another, it is
    np.testing.assert_allclose(draw(3.0, cond), alone, rtol=1e-3, atol=1e-3)
    assert np.abs(draw(3.0, tiny.encode_text(PROMPTS[::-1])) - alone).max() > 0.1


def test_one_compilation_serves_other_weights_guidance_and_schedulers(tiny, drawn):
    z = jax.random.key(0)
    drawn(z)
    model = tiny.with_kernels(tiny.kernels.for_sampling(None))
    run = sampler._compiled(model.network, model.autoencoder)
    before = run._cache_size()
    assert before  # it is the program that drew
    other = jax.tree.map(lambda a: a * 0.9, tiny.params["unet"])
    cond = tiny.encode_text(PROMPTS)
    uncond = tiny.encode_text([""])
    for scheduler, steps in (("ddim", 5), ("pndm", 4), ("dpmsolver++", 5)):
        config = tiny.scheduler_config | {"skip_prk_steps": True}
        model = tiny.replace(scheduler_config=config)
        sample = sampler.make_sampler(model, scheduler, steps, 2.0)
        images = sample(other, tiny.params["vae"], cond, uncond, z)
        assert (images != drawn(z)).any()
    assert run._cache_size() == before


def test_default_scheduler_is_the_folders_own():
    assert schedules.default_scheduler({"_class_name": "PNDMScheduler"}) == "pndm"
    sde = {"_class_name": "DPMSolverMultistepScheduler"}
    sde |= {"algorithm_type": "sde-dpmsolver++"}
    assert schedules.default_scheduler(sde) == "sde-dpmsolver++"


def test_noise_of_the_steps_is_each_examples_own(tiny):
    cond = tiny.encode_text([PROMPTS[0]] * 3)
    key, params = jax.random.key(3), tiny.params["unet"]
    sample = sampler.make_sampler(tiny, "euler_ancestral", 4, 1.0, decode=False)
    together = sample(params, None, cond, None, key)
    latents = sampler.initial_latents(key, 3, tiny.latent_shape)
    keys = sampler.noise_keys(key, np.arange(3))
    last = jax.tree.map(lambda a: a[2:], cond)
    apart = sample(params, None, last, None, latents[2:], keys[2:])
    assert relative_error(apart[0], together[2]) < 1e-5
    same = jnp.broadcast_to(latents[:1], latents.shape)
    drawn = np.asarray(sample(params, None, cond, None, same, keys))
    assert np.abs(drawn[0] - drawn[1]).max() > 0.1  # by the noise of the steps alone
    other = sample(params, None, cond, None, same, sampler.noise_keys(key, [0, 5, 6]))
    assert relative_error(other[0], drawn[0]) < 1e-5
    assert np.abs(other[1] - drawn[1]).max() > 0.1
    with pytest.raises(ValueError, match="draws noise: give a key"):
        sample(params, None, cond, None, latents)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scheduler": "eular"}, "scheduler='eular' is not one of: ddim, .*'euler'"),
        ({"steps": 0}, "steps=0 must be from 1 to 1000"),
        ({"steps": 1001}, "steps=1001 must be from 1 to 1000"),
        ({"steps": 1000}, "steps=1000 with steps_offset=1 reaches timestep 1000"),
        ({"guidance": 0.5}, "guidance=0.5 must be at least 1"),
        ({"guidance": float("nan")}, "guidance=nan must be at least 1"),
        ({"config": {"timestep_spacing": "odd"}}, "timestep_spacing='odd' is not one"),
        ({"config": {"thresholding": True}}, "thresholding=True; must be False"),
    ],
)
def test_bad_options_are_user_errors(tiny, change, message):
    options = {"scheduler": "ddim", "steps": 5, "guidance": 2.0} | change
    config = tiny.scheduler_config | options.pop("config", {})
    with pytest.raises(UserError, match=message):
        sampler.make_sampler(tiny.replace(scheduler_config=config), **options)


def test_exported_model_draws_alike_in_pytorch(tiny_folder, tiny, tmp_path):
    pytest.importorskip("torch")
    from diffusers import StableDiffusionPipeline

    trainable, frozen = select_trainable(tiny.params["unet"], "cross_attention")
    changed = {path: 1.5 * array for path, array in trainable.items()}
    exports.export(tiny_folder, changed, tmp_path / "export")
    pipeline = StableDiffusionPipeline.from_pretrained(str(tmp_path / "export"))
    pipeline.set_progress_bar_config(disable=True)
    latents = sampler.initial_latents(jax.random.key(5), 2, tiny.latent_shape)
    config = scheduler_config("ddim")
    how = {"num_inference_steps": 5, "output_type": "pil"}
    theirs = pytorch_draws(pipeline, config, latents, **how)
    theirs = np.stack([np.asarray(image) for image in theirs]).astype(int)
    unet = merge_params(changed, frozen)
    immunized = tiny.replace(params=tiny.params | {"unet": unet})
    ours = np.asarray(ours_draw(immunized, "ddim", latents, decode=True)).astype(int)
    original = np.asarray(ours_draw(tiny, "ddim", latents, decode=True)).astype(int)
    assert np.abs(ours - original).mean() > 3
    assert np.abs(ours - theirs).mean() <= 1
