# SPDX-License-Identifier: Apache-2.0
"""GIFT on a real UNet: gradients against PyTorch, a step on one and two devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax_names import flax_name

from gift_jax.defenses import gift
from gift_jax.diffusion import normal_like, timesteps
from gift_jax.models import safetensors_io
from gift_jax.models.sd.stable_diffusion import PARTITION_RULES
from gift_jax.training import sharding

KEY = jax.random.key(21)
SETTINGS = {
    "mse": gift.Gift(beta=0.5, ascent_bound="log"),
    "mmd": gift.Gift(
        beta=0.5,
        ascent_bound="hinge",
        ascent_cap=1.47,
        noise_target="matched",
        distance="mmd",
    ),
}


def draw(setup, pairs, key):
    """z, t and eps as the loss draws them."""
    k_z, k_eps, k_t = jax.random.split(key, 3)
    z = pairs["mean"] + pairs["std"] * normal_like(k_z, pairs["mean"])
    eps = normal_like(k_eps, z)
    return z, timesteps(k_t, len(z), setup.denoiser.noise.num_timesteps), eps


@pytest.fixture(scope="module")
def grad_fns(tiny_setup):
    """Jitted value and gradient of the lower loss and of each upper loss."""
    fns = {"lower": gift.make_lower_loss(tiny_setup.denoiser)}
    for name, settings in SETTINGS.items():
        fns[name] = gift.make_upper_loss(tiny_setup.denoiser, settings)
    return {
        name: jax.jit(jax.value_and_grad(fn, has_aux=True)) for name, fn in fns.items()
    }


# --- against PyTorch ------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(tiny_folder, tiny_setup):
    """PyTorch's UNet with the same weights; (per-example loss, hidden states)."""
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(str(tiny_folder / "unet")).eval()
    hiddens = {}
    for name, module in unet.named_modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.register_forward_hook(
                lambda _m, _i, out, name=name: hiddens.update({name: out})
            )

    def loss(pairs, key):
        unet.zero_grad()
        z, t, eps = (torch.tensor(np.asarray(a)) for a in draw(tiny_setup, pairs, key))
        abar = torch.tensor(tiny_setup.denoiser.noise.abar_T)[t.long()]
        abar = abar.reshape(-1, 1, 1, 1)
        z_t = abar.sqrt() * z + (1 - abar).sqrt() * eps
        out = unet(z_t, t, torch.tensor(pairs["cond"]["states"])).sample
        return (out - eps).square().mean(dim=(1, 2, 3)), dict(hiddens)

    return unet, loss


def torch_mse(h, n):
    return (h - n).square().mean()


def torch_mmd(x_ND, y_ND):
    """RepNoise's: five Gaussian kernels around the mean squared distance."""
    import torch

    both = torch.cat([x_ND, y_ND])
    square = (both[:, None] - both[None]).square().sum(-1)
    mean = square.detach().sum() / (len(both) ** 2 - len(both))
    kernel = sum(torch.exp(-square / (mean * w)) for w in (0.25, 0.5, 1.0, 2.0, 4.0))
    n = len(x_ND)
    within = kernel[:n, :n].mean() + kernel[n:, n:].mean()
    return within - 2 * kernel[:n, n:].mean()


def torch_noising(hiddens, key, kind, distance):
    import torch

    names = sorted(hiddens, key=flax_name)
    total = 0.0
    for k, name in zip(jax.random.split(key, len(names)), names, strict=True):
        h = hiddens[name]
        noise = normal_like(k, jnp.zeros(h.shape))
        noise = torch.tensor(np.asarray(noise))
        if kind == "matched":
            flat = h.detach().flatten(0, 1)
            noise = flat.mean(0) + flat.std(0, unbiased=False) * noise
        if distance == "mse":
            total = total + torch_mse(h, noise)
        else:
            pairs = zip(h, noise, strict=True)
            total = total + sum(torch_mmd(x, y) for x, y in pairs) / len(h)
    return total / len(names)


def assert_same_gradients(grads, unet):
    largest, parameters = 0.0, dict(unet.named_parameters())
    for path, ours in grads.items():
        ours = safetensors_io.to_torch_layout(path, np.asarray(ours))
        other = parameters[safetensors_io.torch_name(path)].grad.numpy()
        assert np.abs(other).max() > 0
        largest = max(largest, np.linalg.norm(ours - other) / np.linalg.norm(other))
    assert largest < 1e-4


def test_lower_gradient_equals_pytorch(tiny_setup, grad_fns, theirs):
    unet, loss = theirs
    pairs = tiny_setup.batch["safe"]
    (value, _), grads = grad_fns["lower"](
        tiny_setup.params, tiny_setup.frozen, pairs, KEY
    )
    expected = loss(pairs, KEY)[0].mean()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    assert_same_gradients(grads, unet)


@pytest.mark.parametrize("name", SETTINGS)
def test_upper_gradient_equals_pytorch(tiny_setup, grad_fns, theirs, name):
    unet, loss = theirs
    s, pairs = SETTINGS[name], tiny_setup.batch["harmful"]
    (value, _), grads = grad_fns[name](tiny_setup.params, tiny_setup.frozen, pairs, KEY)
    k_loss, k_noise = jax.random.split(KEY)
    loss_B, hiddens = loss(pairs, k_loss)
    if s.ascent_bound == "log":
        ascent = -(1 + loss_B).log().mean()
    else:
        assert (
            loss_B < s.ascent_cap
        ).sum() == 1  # one example rests, the other does not
        ascent = -loss_B.clamp(max=s.ascent_cap).mean()
    noising = torch_noising(hiddens, k_noise, s.noise_target, s.distance)
    (ascent + s.beta * noising).backward()
    np.testing.assert_allclose(value, (ascent + s.beta * noising).item(), rtol=1e-4)
    assert noising.item() > 1e-2
    assert_same_gradients(grads, unet)


# --- one outer step -------------------------------------------------------------------


@functools.cache
def optimizer():
    """SGD whose rate is an array of its state, so that one step serves all rates."""
    return optax.inject_hyperparams(optax.sgd)(learning_rate=0.0)


@pytest.fixture(scope="module")
def stepper(tiny_setup):
    """(lower rate, upper rate, mesh axis) -> (new state, metrics) of one step.

    With an axis, on two devices along it.
    """
    settings = gift.Gift()
    step = jax.jit(
        gift.make_step(tiny_setup.denoiser, settings, optimizer(), optimizer())
    )

    def take(lower, upper, axis=""):
        shape = dict.fromkeys(sharding.AXES, 1) | ({axis: 2} if axis else {})
        mesh = sharding.make_mesh(jax.devices()[: 2 if axis else 1], shape)
        state = tiny_setup.state(optimizer(), optimizer())
        for level, rate in (("lower", lower), ("upper", upper)):
            state.opt[level].hyperparams["learning_rate"] = jnp.float32(rate)
        args = state, tiny_setup.frozen
        args = sharding.put(args, sharding.shardings(mesh, args, PARTITION_RULES))
        return step(*args, sharding.put_batch(mesh, tiny_setup.batch), KEY)

    return take


def safe_loss(setup, grad_fns, params):
    k_lower, _ = jax.random.split(jax.random.fold_in(KEY, 0))
    args = (setup.frozen, setup.batch["safe"], k_lower)
    return float(grad_fns["lower"](params, *args)[0][0])


def harmful_loss(setup, grad_fns, params):
    _, k_upper = jax.random.split(jax.random.fold_in(KEY, 0))
    args = (setup.frozen, setup.batch["harmful"], k_upper)
    return float(grad_fns["mse"](params, *args)[0][1]["upper/harmful_loss"])


def moved(setup, params):
    return max(float(jnp.abs(params[p] - setup.params[p]).max()) for p in params)


def test_lower_level_lowers_the_safe_loss(tiny_setup, grad_fns, stepper):
    state, _ = stepper(1e-2, 0.0)
    assert moved(tiny_setup, state.params) > 1e-6
    before = safe_loss(tiny_setup, grad_fns, tiny_setup.params)
    assert safe_loss(tiny_setup, grad_fns, state.params) < before


def test_upper_level_raises_the_harmful_loss(tiny_setup, grad_fns, stepper):
    state, _ = stepper(0.0, 1e-2)
    assert moved(tiny_setup, state.params) > 1e-6
    before = harmful_loss(tiny_setup, grad_fns, tiny_setup.params)
    assert harmful_loss(tiny_setup, grad_fns, state.params) > before


def test_step_leaves_the_frozen_parameters_alone(tiny_setup, stepper):
    before = jax.device_get(tiny_setup.frozen)
    state, _ = stepper(1e-2, 1e-2)
    assert all("/attn2/to_" in path for path in state.params)
    assert not set(state.params) & set(before["network"])
    jax.tree.map(np.testing.assert_array_equal, before, tiny_setup.frozen)


@pytest.mark.parametrize(  # of data, test_devices has the whole run
    "axis", [pytest.param("data", marks=pytest.mark.slow), "fsdp", "tensor"]
)
def test_one_and_two_devices_take_the_same_step(tiny_setup, stepper, axis):
    one, m_one = stepper(1e-2, 1e-2)
    two, m_two = stepper(1e-2, 1e-2, axis)
    kernels = [a for path, a in two.params.items() if path.endswith("to_q/kernel")]
    for a in kernels:
        assert len(a.sharding.device_set) == 2
        parts = a.size // a.addressable_shards[0].data.size
        assert parts == (1 if axis == "data" else 2)
    assert kernels
    for path in one.params:
        change = np.asarray(one.params[path] - tiny_setup.params[path])
        other = np.asarray(two.params[path]) - np.asarray(tiny_setup.params[path])
        assert np.abs(change).max() > 0
        np.testing.assert_allclose(two.params[path], one.params[path], atol=1e-5)
        assert np.linalg.norm(other - change) < 1e-2 * np.linalg.norm(change)
    for name in m_one:
        np.testing.assert_allclose(m_two[name], m_one[name], rtol=1e-4)
