# SPDX-License-Identifier: Apache-2.0
"""The schedulers of flow matching against today's PyTorch, and what is refused."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gift_jax.models import flow_schedule
from gift_jax.models.flow_schedule import CLASSES, DEFAULTS
from gift_jax.runtime.errors import UserError
from gift_jax.sampling import sampler, schedules
from gift_jax.sampling.schedulers import flow

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

EULER, HEUN = CLASSES
SD3 = {"_class_name": EULER, "num_train_timesteps": 1000, "shift": 3.0}
SHIFTS = [{"shift": 1.0}, {}, {"shift": 7.5}, {"num_train_timesteps": 500}]
RNG = np.random.default_rng(0)
Z = RNG.normal(size=(2, 4, 8, 8)).astype(np.float32)
OUTPUTS = RNG.normal(size=(60, *Z.shape)).astype(np.float32)


def torch_scheduler(config, steps):
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("changes", SHIFTS)
def test_training_levels_equal_pytorch_bit_for_bit(changes):
    config = SD3 | changes
    theirs = getattr(diffusers, EULER).from_config(config)
    noise = flow_schedule.noise_process(config)
    np.testing.assert_array_equal(noise.sigma_T, theirs.sigmas)
    T = config["num_train_timesteps"]
    np.testing.assert_array_equal(np.float32(T) * noise.sigma_T, theirs.timesteps)
    assert noise.num_timesteps == T


@pytest.mark.parametrize("changes", SHIFTS)
@pytest.mark.parametrize("steps", [1, 5, 28])
def test_every_step_of_euler_equals_pytorch_bit_for_bit(changes, steps):
    config = SD3 | changes
    theirs = torch_scheduler(config, steps)
    t, sigmas = flow.levels(flow_schedule.complete(config), steps)
    np.testing.assert_array_equal(t, theirs.timesteps)
    np.testing.assert_array_equal(sigmas, theirs.sigmas)
    table = schedules.schedule(config, "", steps)
    np.testing.assert_array_equal(table.t, theirs.timesteps)
    x, registers = torch.tensor(Z), schedules.start(Z)
    for i, time in enumerate(theirs.timesteps):
        row = schedules.Schedule(*(np.float32(column[i]) for column in table))
        assert row.scale == 1
        registers = schedules.advance(row, registers, OUTPUTS[i])
        x = theirs.step(torch.tensor(OUTPUTS[i]), time, x, return_dict=False)[0]
        np.testing.assert_array_equal(registers[0], x)
    assert np.abs(x.numpy() - Z).max() > 0.3


@pytest.mark.parametrize("changes", SHIFTS)
@pytest.mark.parametrize("steps", [1, 5, 28])
def test_every_step_of_heun_equals_pytorch(changes, steps):
    config = SD3 | changes | {"_class_name": HEUN}
    theirs = torch_scheduler(config, steps)
    table = schedules.schedule(config, "", steps)
    np.testing.assert_array_equal(table.t, theirs.timesteps)
    assert len(table.t) == 2 * steps - 1
    theirs.sigmas = theirs.sigmas.double()  # it divides the rounding of a difference
    x, registers = torch.tensor(Z), schedules.start(Z)
    for i, time in enumerate(theirs.timesteps):
        row = schedules.Schedule(*(np.float32(column[i]) for column in table))
        registers = schedules.advance(row, registers, OUTPUTS[i])
        m = torch.tensor(OUTPUTS[i]).double()
        x = theirs.step(m, time, x, return_dict=False)[0]
        np.testing.assert_allclose(registers[0], x, atol=2e-6)
    assert np.abs(x.numpy() - Z).max() > 0.3


class Network:
    """Stands in for a denoiser; its conditioning moves the output."""

    def with_cond(self, params, cond):
        return lambda z, t: jnp.tanh(
            params * z + cond[:, None, None, None] + t[:, None, None, None] / 1000
        )


@pytest.mark.parametrize("cls", CLASSES)
def test_guided_sampling_equals_pytorchs_loop(cls):
    config = SD3 | {"_class_name": cls}
    table = jax.tree.map(np.float32, schedules.schedule(config, "", 6))
    cond, uncond = np.float32([0.3, -0.8]), np.float32([0.1])
    ours = sampler.sample_latents(Network(), 1.3, table, 4.0, Z, cond, uncond)
    theirs, x = torch_scheduler(config, 6), torch.tensor(Z)
    for time in theirs.timesteps:
        m = [
            torch.tanh(1.3 * x + torch.tensor(c)[:, None, None, None] + time / 1000)
            for c in (uncond, cond)
        ]
        x = theirs.step(m[0] + 4.0 * (m[1] - m[0]), time, x, return_dict=False)[0]
    np.testing.assert_allclose(ours, x, atol=1e-5)
    plain = sampler.sample_latents(Network(), 1.3, table, 1.0, Z, cond, None)
    assert np.abs(plain - ours).max() > 0.1


# --- the config -----------------------------------------------------------------------


def test_keys_and_defaults_are_those_of_diffusers():
    def parameters(cls):
        own = inspect.signature(getattr(diffusers, cls).__init__).parameters
        return {name: p.default for name, p in own.items() if name != "self"}

    assert parameters(EULER) == DEFAULTS
    assert parameters(HEUN).items() <= DEFAULTS.items()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dynamic_shifting": True}, "True is not supported; must be False: a shi"),
        ({"invert_sigmas": True}, "invert_sigmas=True is not supported"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas=True is not supported"),
        ({"use_exponential_sigmas": True}, "use_exponential_sigmas=True is not"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas=True is not supported"),
        ({"shift_terminal": 0.1}, "shift_terminal=0.1 is not supported"),
        ({"stochastic_sampling": True}, "stochastic_sampling=True is not supported"),
        ({"shift": 0}, "shift=0 is not supported; must be a number above 0"),
        ({"shift": "3"}, "shift='3' is not supported"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0 is not supported"),
        ({"time_shift_type": "other"}, "time_shift_type='other' is not supported"),
        ({"beta_start": 0.1}, "beta_start=0.1 is of no known key"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change, message):
    flow_schedule.check(SD3, "folder/file.json")
    with pytest.raises(UserError, match=f"^folder/file.json: .*{message}"):
        flow_schedule.check(SD3 | change, "folder/file.json")
    with pytest.raises(UserError, match=f"^scheduler: .*{message}"):
        schedules.schedule(SD3 | change, "", 5)


def test_another_class_is_refused_with_the_file():
    config = {"_class_name": "DDIMScheduler"}
    with pytest.raises(UserError, match="^file: scheduler 'DDIMScheduler' is not one"):
        flow_schedule.check(config, "file")


def test_other_keys_have_no_effect():
    harmless = {"base_shift": 0.1, "max_shift": 2.0, "base_image_seq_len": 64}
    harmless |= {"max_image_seq_len": 128, "time_shift_type": "linear"}
    harmless |= {"_diffusers_version": "0.29", "use_dynamic_shifting": None}
    unset = SD3 | {"shift": 9.0, "_use_default_values": ["shift"]}
    table = schedules.schedule(SD3, "", 5)
    for config, expected in ((SD3 | harmless, SD3), (unset, SD3 | {"shift": 1.0})):
        theirs = torch_scheduler(config, 5)
        ours = schedules.schedule(config, "", 5)
        np.testing.assert_array_equal(ours.t, theirs.timesteps)
        np.testing.assert_array_equal(ours.t, schedules.schedule(expected, "", 5).t)
    assert not np.array_equal(ours.t, table.t)


def test_schedulers_are_those_of_the_models_process():
    ddpm = {"_class_name": "PNDMScheduler"}
    assert schedules.default_scheduler(SD3) == "flow_euler"
    assert schedules.default_scheduler(SD3 | {"_class_name": HEUN}) == "flow_heun"
    assert schedules.first_order(SD3 | {"_class_name": HEUN}) == "flow_euler"
    assert schedules.first_order(ddpm) == "ddim"
    assert len(schedules.schedule(SD3, "flow_heun", 5).t) == 9
    with pytest.raises(UserError, match="euler is not for a model of flow matching"):
        schedules.schedule(SD3, "euler", 5)
    with pytest.raises(UserError, match="flow_euler is not for a model of DDPM.* ddim"):
        schedules.schedule(ddpm, "flow_euler", 5)
    with pytest.raises(UserError, match="steps=1001 must be from 1 to 1000"):
        schedules.schedule(SD3, "", 1001)
