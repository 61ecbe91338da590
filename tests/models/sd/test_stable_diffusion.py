# SPDX-License-Identifier: Apache-2.0
"""Loading a model folder, and what it encodes and decodes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import write_tiny

from gift_jax.models.folder import read_scheduler
from gift_jax.models.sd import scheduler_config, stable_diffusion
from gift_jax.runtime.errors import UserError


def test_load_describes_the_model(tiny):
    assert tiny.latent_shape == (4, 8, 8)
    assert (tiny.image_size, tiny.max_length) == (16, 16)
    assert tiny.prediction_type == "epsilon"
    assert set(tiny.params) == {"unet", "vae", "text_encoder"}


def test_load_casts_to_the_dtype_asked_for(tiny_folder):
    model = stable_diffusion.load(tiny_folder, jnp.bfloat16)
    dtypes = {a.dtype for a in jax.tree.leaves(model.params)}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}
    states = model.encode_text(["a dog"])["states"]
    assert states.dtype == jnp.float32


def test_load_refuses_what_is_not_a_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder.*hub id"):
        stable_diffusion.load("someone/some-model")
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"from_single_file\(FILE\)\.save_pretrained"):
        stable_diffusion.load(file)
    with pytest.raises(UserError, match=r"model_index\.json: no such file"):
        stable_diffusion.load(tmp_path)


def test_resolution_sets_the_size_of_latents_and_pictures(tiny_folder):
    model = stable_diffusion.load(tiny_folder, resolution=24)
    assert (model.latent_shape, model.image_size) == ((4, 12, 12), 24)
    images = np.zeros((1, 24, 24, 3), np.float32)
    mean, _ = model.encode_images(images)
    assert mean.shape == (1, *model.latent_shape)
    for wrong in (18, -4):
        with pytest.raises(
            UserError, match=f"resolution={wrong} must be a multiple of 4"
        ):
            stable_diffusion.load(tiny_folder, resolution=wrong)


def test_prompts_equal_pytorch_pipeline(tiny, tiny_folder):
    pytest.importorskip("torch")
    from diffusers import StableDiffusionPipeline

    prompts = ["a Dog", "", "a very long prompt that will not fit into the model"]
    pipeline = StableDiffusionPipeline.from_pretrained(str(tiny_folder))
    theirs, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    ours = tiny.encode_text(prompts)["states"]
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=2e-5)


def test_encoding_does_not_depend_on_the_batch(tiny, rng):
    prompts = ["a", "bb", "ccc", "dddd", "eeeee"]
    together = tiny.encode_text(prompts)["states"]
    assert together.shape == (5, 16, 32)
    assert np.abs(together[0] - together[1]).max() > 1e-3
    apart = tiny.encode_text(prompts, batch_size=2)["states"]
    np.testing.assert_allclose(apart, together, atol=1e-5)
    images = rng.uniform(-1, 1, size=(3, 16, 16, 3)).astype(np.float32)
    mean, std = tiny.encode_images(images)
    alone, _ = tiny.encode_images(images[2:])
    assert mean.shape == std.shape == (3, 4, 8, 8)
    assert (std > 0).all()
    np.testing.assert_allclose(alone[0], mean[2], atol=1e-5)


def test_latents_are_scaled_and_decoded_back(tiny, tiny_folder, rng):
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(str(tiny_folder / "vae"))
    images = rng.uniform(-1, 1, size=(1, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = vae.encode(torch.tensor(images.transpose(0, 3, 1, 2))).latent_dist
        image = vae.decode(posterior.mean).sample.numpy().transpose(0, 2, 3, 1)
    mean, std = tiny.encode_images(images)
    assert tiny.scaling_factor == 0.5
    np.testing.assert_allclose(mean, 0.5 * posterior.mean.numpy(), atol=1e-5)
    np.testing.assert_allclose(std, 0.5 * posterior.std.numpy(), atol=1e-5)
    ours = tiny.decode(mean)
    np.testing.assert_allclose(ours, image, atol=1e-4)


def test_images_of_a_wrong_shape_are_refused(tiny):
    with pytest.raises(UserError, match=r"must be \(B, H, W, 3\)"):
        tiny.encode_images(np.zeros((16, 16, 3)))
    with pytest.raises(UserError, match="must be multiples of 2"):
        tiny.encode_images(np.zeros((1, 15, 16, 3)))
    with pytest.raises(UserError, match="prompts is empty"):
        tiny.encode_text([])["states"]


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_schedule_equals_pytorch(tiny, name, zero_snr):
    pytest.importorskip("torch")
    from diffusers import DDIMScheduler

    config = {"beta_schedule": name, "rescale_betas_zero_snr": zero_snr}
    config = tiny.scheduler_config | config
    theirs = DDIMScheduler.from_config(config).alphas_cumprod.numpy()
    ours = tiny.replace(scheduler_config=config).noise.abar_T
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "'FlowMatchEulerDiscreteScheduler' is not one of .*DDIMScheduler",
        ),
        (
            {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
            "use_flow_sigmas=True; must be False",
        ),
        ({"shift": 3.0}, "shift=3.0 is no key of diffusers' schedulers"),
        ({"beta_start": "1e-4"}, "beta_start='1e-4'; must be a number"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0; must be at least 1"),
        ({"trained_betas": [0.1]}, "trained_betas has 1 numbers"),
    ],
)
def test_noise_that_is_no_ddpms_is_refused_with_the_file(config, message):
    with pytest.raises(UserError, match=f"^folder/file.json: .*{message}"):
        scheduler_config.check(config, "folder/file.json")


def test_scheduler_is_of_the_class_that_model_index_names(tmp_path):
    pytest.importorskip("torch")
    from diffusers import StableDiffusionPipeline

    folder = write_tiny(tmp_path / "sd", scheduler={"timestep_spacing": "trailing"})
    index = folder / "model_index.json"
    text = index.read_text()
    assert "DDIMScheduler" in text
    index.write_text(text.replace("DDIMScheduler", "EulerDiscreteScheduler"))
    theirs = StableDiffusionPipeline.from_pretrained(str(folder)).scheduler
    assert type(theirs).__name__ == "EulerDiscreteScheduler"
    config = read_scheduler(folder)
    assert scheduler_config.class_name(config) == "EulerDiscreteScheduler"
    full = scheduler_config.complete(config)
    assert full == {key: theirs.config[key] for key in full} | {
        "steps_offset": full["steps_offset"]  # which the pipeline corrects
    }


def test_unknown_noise_schedule_lists_the_choices(tiny):
    config = {"beta_schedule": "sigmoid"}
    with pytest.raises(UserError, match="'sigmoid'; must be one of linear"):
        assert tiny.replace(scheduler_config=config).noise
