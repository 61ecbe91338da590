# SPDX-License-Identifier: Apache-2.0
"""ESD against PyTorch, its trajectories against the sampler, and what it does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_denoiser
from tiny_model import relative_error

from gift_jax.data.pipeline import DeduplicatedArray
from gift_jax.defenses import esd
from gift_jax.diffusion import Ddpm, Denoiser
from gift_jax.models import safetensors_io
from gift_jax.models.load import load_model
from gift_jax.models.trainable import select_trainable
from gift_jax.runtime.errors import UserError
from gift_jax.sampling import sampler, schedules
from gift_jax.state import init_state, merge_params
from gift_jax.training import sharding

KEY = jax.random.key(5)
SHAPE = toy_denoiser.Model.latent_shape


# --- against PyTorch ------------------------------------------------------------------


def moved(params, seed=0):
    """Parameters somewhat away from the given ones."""
    rng = np.random.default_rng(seed)
    return {
        path: jnp.asarray(a * (1 + 0.3 * rng.normal(size=a.shape)), a.dtype)
        for path, a in params.items()
    }


@pytest.fixture(scope="module")
def unets(tiny_folder, tiny_setup):
    """PyTorch's original UNet, and one with the moved parameters."""
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel

    load = functools.partial(
        UNet2DConditionModel.from_pretrained, str(tiny_folder / "unet")
    )
    original, student = load().eval(), load().eval()
    parameters = dict(student.named_parameters())
    for path, array in moved(tiny_setup.params).items():
        value = safetensors_io.to_torch_layout(path, np.asarray(array))
        with torch.no_grad():
            parameters[safetensors_io.torch_name(path)].copy_(torch.tensor(value))
    return original, student


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_loss_and_gradient_equal_pytorch(tiny_setup, unets, rng, kind):
    import torch

    abar_T = tiny_setup.denoiser.noise.abar_T
    denoiser = Denoiser(tiny_setup.denoiser.predict, Ddpm(abar_T, kind))
    z, c, empty = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((2, 4, 8, 8), (2, 16, 32), (1, 16, 32))
    )
    t, eta = np.asarray([150, 900], np.int32), 1.7
    originals = {"original": tiny_setup.params, "empty": {"states": empty}}
    frozen, pairs = tiny_setup.frozen | originals, {"z": z, "t": t}
    loss = esd.make_loss(denoiser, esd.Esd(eta=eta))
    (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        moved(tiny_setup.params), frozen, pairs | {"cond": {"states": c}}
    )

    original, student = unets
    abar = torch.tensor(abar_T)[torch.tensor(t).long()]
    alpha, sigma = (a.sqrt().reshape(2, 1, 1, 1) for a in (abar, 1 - abar))
    z, t, c, empty = (torch.tensor(a) for a in (z, t, c, empty))

    def eps(unet, text):
        out = unet(z, t, text).sample
        return out if kind == "epsilon" else alpha * out + sigma * z

    with torch.no_grad():
        e_0, e_c = eps(original, empty.repeat(2, 1, 1)), eps(original, c)
    student.zero_grad()
    expected = torch.nn.functional.mse_loss(eps(student, c), e_0 - eta * (e_c - e_0))
    expected.backward()

    assert (e_c - e_0).square().mean() > 1e-4  # the concept means something
    np.testing.assert_allclose(value, expected.item(), rtol=1e-4)
    parameters = dict(student.named_parameters())
    for path, ours in grads.items():
        theirs = parameters[safetensors_io.torch_name(path)].grad.numpy()
        assert np.abs(theirs).max() > 0
        ours = safetensors_io.to_torch_layout(path, np.asarray(ours))
        assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs), path


# --- trajectories ---------------------------------------------------------------------

WALK = esd.Esd(steps=6, guidance=4.0)


@pytest.fixture(scope="module")
def walked(tiny):
    """Three trajectories of the tiny model, walked two at a time."""
    cond = jax.device_get(tiny.encode_text(["a dog", "two", "red"]))
    empty = jax.device_get(tiny.encode_text([""]))
    each = DeduplicatedArray(cond, np.arange(3))
    return cond, empty, esd.trajectories(tiny, each, empty, KEY, WALK, batch=2)


def test_trajectory_ends_where_the_sampler_does(tiny, walked):
    cond, empty, cached = walked
    sample = sampler.make_sampler(tiny, "ddim", 6, 4.0, decode=False)
    end = sample(tiny.params["unet"], None, cond, empty, KEY)
    assert cached["z"].shape == (3, 6, *tiny.latent_shape)
    assert relative_error(cached["end"], end) < 1e-5
    noise = sampler.initial_latents(KEY, 3, tiny.latent_shape)
    np.testing.assert_array_equal(cached["z"][:, 0], noise)
    assert (np.diff(cached["t"]) < 0).all()
    assert np.abs(np.diff(cached["z"], axis=1)).max(axis=(0, 2, 3, 4)).min() > 1e-2


def test_trajectory_equals_pytorch_at_every_row(tiny_folder, walked):
    torch = pytest.importorskip("torch")
    from diffusers import DDIMScheduler, UNet2DConditionModel

    cond, empty, cached = walked
    text, empty = cond["states"], empty["states"]
    unet = UNet2DConditionModel.from_pretrained(str(tiny_folder / "unet")).eval()
    scheduler = DDIMScheduler.from_pretrained(str(tiny_folder / "scheduler"))
    scheduler.set_timesteps(6)
    np.testing.assert_array_equal(cached["t"], scheduler.timesteps)
    x, c, e = torch.tensor(cached["z"][:1, 0]), *map(torch.tensor, (text[:1], empty))
    with torch.no_grad():
        for row, t in enumerate(scheduler.timesteps):
            assert relative_error(cached["z"][:1, row], x.numpy()) < 1e-4
            none, cond = unet(x, t, e).sample, unet(x, t, c).sample
            x = scheduler.step(none + 4.0 * (cond - none), t, x).prev_sample


def test_walk_stops_each_example_at_its_own_row(tiny, walked):
    cond, empty, cached = walked
    walk = jax.jit(esd.make_walk(tiny.denoiser, WALK, tiny.scheduler_config))
    row = np.asarray([5, 0, 2])
    z = walk(tiny.params["unet"], cached["z"][:, 0], row, cond, empty)
    assert relative_error(z, cached["z"][np.arange(3), row]) < 1e-5


def test_rows_are_all_the_trajectories(walked):
    z = walked[2]["z"]
    rows = esd.rows(z)
    assert len(rows["z"]) == len(rows["row"]) == len(rows["trajectory"]) == 18
    for i in (0, 7, 17):
        np.testing.assert_array_equal(
            rows["z"][i], z[rows["trajectory"][i], rows["row"][i]]
        )
    assert set(zip(rows["trajectory"], rows["row"], strict=True)) == {
        (n, s) for n in range(3) for s in range(6)
    }


def test_trajectories_refuse_more_steps_than_the_model_has(tiny, walked):
    with pytest.raises(UserError, match="steps=1001 must be from 1 to 1000"):
        each = DeduplicatedArray(walked[0], np.arange(3))
        esd.trajectories(tiny, each, walked[1], KEY, esd.Esd(steps=1001))


@pytest.mark.parametrize("total, steps", [(1000, 50), (10, 3)])
def test_timesteps_fill_the_interval_of_their_row(total, steps):
    s, noise = esd.Esd(steps=steps), Ddpm(np.ones(total))
    t_S = schedules.schedule({"num_train_timesteps": total}, "ddim", steps).t
    row = np.repeat(np.arange(steps), 200)
    t = np.asarray(esd.timesteps_of_rows(noise, KEY, row, s, t_S)).reshape(steps, 200)
    for r in range(steps):
        i = steps - 1 - r  # the paper counts from the clean end
        assert set(t[r]) == set(range(total * i // steps, total * (i + 1) // steps))
    exact = esd.timesteps_of_rows(
        noise, KEY, row, dataclasses.replace(s, timestep="row"), t_S
    )
    np.testing.assert_array_equal(exact, t_S[row])


# --- the step -------------------------------------------------------------------------


def toy_step(latents="frozen", count=4, lr=0.01, jit=True, **settings):
    """(state, frozen, batch, step) on the toy denoiser, cross-attention trainable."""
    s = esd.Esd(latents=latents, steps=5, **settings)
    trainable, rest = select_trainable(toy_denoiser.params(), "cross_attention")
    rng = np.random.default_rng(9)
    text = rng.normal(size=(1, toy_denoiser.L, toy_denoiser.D)).astype(np.float32)
    frozen = {"network": rest, "original": trainable, "empty": {"states": text}}
    pairs = {"cond": toy_denoiser.batch(count)["cond"]}
    if latents == "frozen":
        pairs["z"] = toy_denoiser.batch(count)["mean"]
        pairs["row"] = jnp.arange(count, dtype=jnp.int32) % 5
    tx = optax.adam(lr)
    step = esd.make_step(toy_denoiser.denoiser(), s, tx, toy_denoiser.SCHEDULER, SHAPE)
    state = init_state(trainable, {"upper": tx.init(trainable)})
    return state, frozen, {"harmful": pairs}, jax.jit(step) if jit else step


@pytest.mark.parametrize("latents", esd.LATENTS)
def test_step_repeats_itself_and_leaves_the_frozen_alone(latents):
    state, frozen, batch, step = toy_step(latents, count=12)
    before = jax.device_get(frozen)
    one, m_one = step(state, frozen, batch, KEY)
    two, m_two = step(state, frozen, batch, KEY)
    jax.tree.map(np.testing.assert_array_equal, (one, m_one), (two, m_two))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(frozen))
    assert int(one.step) == 1
    assert set(m_one) == {"esd/loss", "esd/grad_norm"}
    assert all(
        float(jnp.abs(one.params[p] - frozen["original"][p]).max()) > 0
        for p in one.params
    )
    _, other = step(state, frozen, batch, jax.random.key(6))
    _, later = step(state.replace(step=state.step + 1), frozen, batch, KEY)
    assert len({float(m["esd/loss"]) for m in (m_one, other, later)}) == 3


def test_step_takes_the_loss_at_the_rows_it_is_given():
    state, frozen, batch, step = toy_step(timestep="row")
    _, metrics = step(state, frozen, batch, KEY)
    pairs = batch["harmful"]
    t_S = schedules.schedule(toy_denoiser.SCHEDULER, "ddim", 5).t
    examples = {"z": pairs["z"], "t": t_S[pairs["row"]], "cond": pairs["cond"]}
    loss = esd.make_loss(toy_denoiser.denoiser(), esd.Esd())
    expected, _ = loss(state.params, frozen, examples)
    np.testing.assert_allclose(metrics["esd/loss"], expected, rtol=1e-5)


def test_current_trajectories_come_from_the_model_in_training():
    state, frozen, batch, step = toy_step("current")
    _, before = step(state, frozen, batch, KEY)
    original = {path: 1.5 * a for path, a in frozen["original"].items()}
    moved_state = state.replace(params=original)
    _, both = step(moved_state, frozen | {"original": original}, batch, KEY)
    _, walked = step(state, frozen | {"original": original}, batch, KEY)
    losses = {float(m["esd/loss"]) for m in (before, both, walked)}
    assert len(losses) == 3  # where it walks depends on the trained parameters


@pytest.mark.parametrize("latents", esd.LATENTS)
def test_example_does_not_depend_on_the_rest_of_the_batch(latents):
    """What the first two add to the loss is the same beside any other two."""
    state, frozen, batch, step = toy_step(latents, count=8)

    def loss(*examples):
        some = jax.tree.map(lambda a: a[np.asarray(examples)], batch)
        return float(step(state, frozen, some, KEY)[1]["esd/loss"])

    one, other = (
        loss(0, 1, 2, 3) - loss(4, 5, 2, 3),
        loss(0, 1, 6, 7) - loss(4, 5, 6, 7),
    )
    assert abs(one) > 1e-2
    np.testing.assert_allclose(one, other, rtol=1e-3)


@pytest.mark.parametrize("latents", esd.LATENTS)
def test_one_and_two_devices_take_the_same_step(latents):
    state, frozen, batch, step = toy_step(latents)
    results = []
    for devices in (1, 2):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        args = sharding.replicate(mesh, (state, frozen))
        new, metrics = step(*args, sharding.put_batch(mesh, batch), KEY)
        assert len(jax.tree.leaves(new.params)[0].sharding.device_set) == devices
        results.append(jax.device_get((new.params, metrics)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), *results)


def test_latents_of_the_model_in_training_need_a_shape():
    s = esd.Esd(latents="current", steps=5)
    args = toy_denoiser.denoiser(), s, optax.sgd(1.0), toy_denoiser.SCHEDULER
    with pytest.raises(ValueError, match="needs latent_shape"):
        esd.make_step(*args)


# --- direction ------------------------------------------------------------------------


@pytest.mark.slow
def test_concept_moves_to_its_target_and_other_prompts_less():
    """On emoji-sd: a few steps on "bomb" do much less to "cat face" and to ""."""
    model = load_model("emoji-sd")
    prompts = ["a noto emoji of a bomb", "a noto emoji of a cat face", ""]
    states = model.encode_text(prompts)["states"]
    s = esd.Esd(steps=10)
    batch = {  # a trajectory's first row is noise
        "z": sampler.initial_latents(KEY, 4, model.latent_shape),
        "row": jnp.zeros(4, jnp.int32),
        "cond": {"states": jnp.repeat(states[:1], 4, axis=0)},
    }
    parts = model.split("cross_attention")
    frozen = {
        "network": parts.frozen,
        "original": parts.trainable,
        "empty": {"states": states[2:]},
    }
    denoiser, tx = model.denoiser, optax.adam(1e-3)
    step = jax.jit(esd.make_step(denoiser, s, tx, model.scheduler_config))
    state = init_state(parts.trainable, {"upper": tx.init(parts.trainable)})
    for _ in range(12):
        state, _ = step(state, frozen, {"harmful": batch}, KEY)

    t_S = schedules.schedule(model.scheduler_config, "ddim", s.steps).t
    t = esd.timesteps_of_rows(denoiser.noise, KEY, batch["row"], s, t_S)

    @jax.jit
    def eps(params, text_LD):
        unet = merge_params(params, parts.frozen)
        cond = {"states": jnp.broadcast_to(text_LD, (4, *text_LD.shape))}
        return denoiser.predict(unet, batch["z"], t, cond, ())[0]

    def change(text_LD):
        before, after = (eps(p, text_LD) for p in (parts.trainable, state.params))
        return float(jnp.mean(jnp.square(after - before)))

    bomb, cat, none = states
    e_c, e_0 = eps(parts.trainable, bomb), eps(parts.trainable, none)
    target = e_0 - s.eta * (e_c - e_0)
    distance = [
        float(jnp.mean(jnp.square(eps(p, bomb) - target)))
        for p in (parts.trainable, state.params)
    ]
    assert distance[0] > 1e-3  # the two differ to begin with
    print(f"distance {distance}; changes {[change(c) for c in states]}")
    assert distance[1] < 0.7 * distance[0]
    assert change(cat) < 0.75 * change(bomb)
    assert change(none) < 0.75 * change(bomb)
