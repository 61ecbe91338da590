# SPDX-License-Identifier: Apache-2.0
"""Every method's gradients against PyTorch, from the papers' equations.

Both sides get the same weights, pairs, noise and timesteps. A recording SGD stands for
the optimizers, so that one step of a method yields the gradient of each of its levels,
the second taken where the first one's update has led.
"""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from pytorch_reference import (
    Theirs,
    assert_same,
    descended,
    gradient,
    merged,
    names_of,
    recorder,
    tensor,
)

from gift_jax.attacks import lora
from gift_jax.defenses import esd, gift, imma
from gift_jax.defenses import gift_adversarial as adversarial
from gift_jax.models import safetensors_io
from gift_jax.models.sd.stable_diffusion import LORA_TARGETS
from gift_jax.models.trainable import select_trainable
from gift_jax.state import init_state, make_update

torch = pytest.importorskip("torch")

KEY = jax.random.key(11)
ADAM_RATE = 1e-3  # of the attacker: it moves every weight by about this


@pytest.fixture(scope="module")
def ours(tiny):
    """(denoiser, every parameter of the UNet, batch of two pairs a level)."""
    rng = np.random.default_rng(3)
    width = tiny.text_encoder.config.hidden_size

    def pairs():
        shape, states = (2, *tiny.latent_shape), (2, tiny.max_length, width)
        return {
            "mean": rng.normal(size=shape).astype(np.float32),
            "std": rng.uniform(0.01, 0.1, size=shape).astype(np.float32),
            "cond": {"states": rng.normal(size=states).astype(np.float32)},
        }

    unet = flatten_dict(tiny.params["unet"], sep="/")
    return tiny.denoiser, unet, {"safe": pairs(), "harmful": pairs()}


@pytest.fixture(scope="module")
def theirs(tiny, ours):
    return Theirs(tiny.path, tiny.noise.abar_T)


# An attacker's Adam divides gradients near zero by their size, and so magnifies what
# they were rounded by: PyTorch in float32 is itself 1.0e-4 from PyTorch in float64.
AFTER_ADAM = 3e-4


# --- GIFT and its ablations -----------------------------------------------------------

ABLATIONS = {
    "gift": gift.Gift(beta=0.5, ascent_bound="log", noise_target="matched"),
    "standard": gift.Gift(beta=0.5, ascent_bound="hinge"),
    "maximize_prior": gift.Gift(beta=0.0, ascent_bound="hinge", ascent_cap=1e3),
    "maximize": gift.Gift(beta=0.0, inner_steps=0),
}
SLOW = ("standard",)  # which differs in the noise alone


def upper_loss(theirs, s, pairs, key, there=lambda params: params):
    """GIFT's upper level in PyTorch; there: from parameters to where it is taken."""
    k_loss, k_noise = jax.random.split(key)

    def upper(params):
        loss = theirs.losses(there(params), pairs, k_loss)
        ascent = {
            "raw": -loss.mean(),
            "log": -(1 + loss).log().mean(),
            "hinge": -loss.clamp(max=s.ascent_cap).mean(),
        }[s.ascent_bound]
        noise = theirs.noising(k_noise, s.noise_target) if s.beta else 0.0
        return ascent + s.beta * noise

    return upper


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in ABLATIONS]
)
def test_gift_and_its_ablations(ours, theirs, name):
    denoiser, unet, batch = ours
    s = ABLATIONS[name]
    trainable, frozen = select_trainable(unet, "cross_attention")
    psi = names_of(trainable)
    step = jax.jit(gift.make_step(denoiser, s, recorder(), recorder()))
    opt = {level: recorder().init(trainable) for level in ("lower", "upper")}
    new, metrics = step(init_state(trainable, opt), {"network": frozen}, batch, KEY)

    k_lower, k_upper = jax.random.split(jax.random.fold_in(KEY, 0))
    params = theirs.start
    if s.inner_steps:
        grads, _ = gradient(
            lambda q: theirs.losses(q, batch["safe"], k_lower).mean(), params, psi
        )
        assert_same(new.opt["lower"], grads)
        params = descended(params, grads)
    upper = upper_loss(theirs, s, batch["harmful"], k_upper)
    grads, value = gradient(upper, params, psi)
    assert_same(new.opt["upper"], grads)
    np.testing.assert_allclose(metrics["upper/loss"], value, rtol=1e-4)
    assert ("lower/loss" in metrics) == bool(s.inner_steps)


# --- GIFT with an attacker in the loop ------------------------------------------------


def attacked(theirs, s, params, pairs, key):
    """What an attacker's first call makes of the parameters: constants."""
    keys = jax.random.split(jax.random.split(key, 4)[3], s.steps_max)
    moments = dict.fromkeys(params, (0.0, 0.0))
    for i, k in enumerate(keys):
        grads, _ = gradient(
            lambda q, k=k: theirs.losses(q, pairs, k).mean(), params, params
        )
        params = dict(params)
        for name, g in grads.items():  # Kingma & Ba 2015, algorithm 1
            m, v = moments[name]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
            moments[name] = m, v
            m, v = m / (1 - 0.9 ** (i + 1)), v / (1 - 0.999 ** (i + 1))
            params[name] = params[name] - s.lr_max * m / (v.sqrt() + 1e-8)
    return {name: value.detach() for name, value in params.items()}


def test_gift_adversarial(ours, theirs):
    """The lower level towards the original, the upper one where the attack has led."""
    denoiser, unet, batch = ours
    attacker = adversarial.Attacker(
        restart_every=10**6,
        steps_min=2,
        steps_max=2,
        lr_min=ADAM_RATE,
        lr_max=ADAM_RATE,
    )
    s = adversarial.GiftAdversarial(beta=0.5, attacker=attacker)
    trainable, frozen = select_trainable(unet, "cross_attention")
    psi = names_of(trainable)
    moved = {path: 1.05 * a for path, a in trainable.items()}  # else the target is met
    opt = {level: recorder().init(trainable) for level in ("lower", "upper")}
    opt["attacker"] = adversarial.init_attacker(unet)
    lower = adversarial.make_lower_loss(denoiser, s.lower_target)
    step = adversarial.make_step(
        make_update("lower", lower, recorder()),
        make_update("upper", adversarial.make_upper_loss(denoiser, s), recorder()),
        adversarial.make_continue_attack(denoiser, s.attacker),
        s.lower_loss_limit,
    )
    frozen = {"network": frozen, "original": trainable}
    new, metrics = jax.jit(step)(init_state(moved, opt), frozen, batch, KEY)

    k_lower, k_upper = jax.random.split(jax.random.fold_in(KEY, 0))
    params = {n: 1.05 * p if n in psi else p for n, p in theirs.start.items()}
    with torch.no_grad():
        originals = theirs.outputs(theirs.start, batch["safe"], k_lower)[0]

    def preserved(q):
        out, _ = theirs.outputs(q, batch["safe"], k_lower)
        return (out - originals).square().mean()

    grads, value = gradient(preserved, params, psi)
    assert value > 1e-5
    np.testing.assert_allclose(metrics["lower/loss"], value, rtol=1e-3)
    assert_same(new.opt["lower"], grads)
    params = descended(params, grads)
    k_attack = jax.random.fold_in(k_upper, 1)
    after = attacked(theirs, attacker, params, batch["harmful"], k_attack)
    delta = {name: after[name] - params[name] for name in params}
    assert max(float(d.abs().max()) for d in delta.values()) > 1e-4
    upper = upper_loss(
        theirs,
        s,
        batch["harmful"],
        k_upper,
        lambda q: {name: p + delta[name] for name, p in q.items()},
    )
    grads, value = gradient(upper, params, psi)
    assert_same(new.opt["upper"], grads, AFTER_ADAM)
    np.testing.assert_allclose(metrics["upper/loss"], value, rtol=1e-4)


# --- IMMA -----------------------------------------------------------------------------


@pytest.mark.parametrize("inner_attack", imma.INNER_ATTACKS)
def test_imma(ours, theirs, inner_attack):
    denoiser, unet, batch = ours
    s = imma.Imma(inner_attack=inner_attack, rank=2, alpha=3.0)  # raw, as published
    psi = tuple(select_trainable(unet, "attention")[0])
    params, frozen, factors = dict(unet), {}, {}
    k_init = jax.random.key(2)
    if inner_attack == "lora":
        params = {path: unet[path] for path in psi}
        frozen = {path: a for path, a in unet.items() if path not in params}
        random = lora.init(k_init, unet, 2, LORA_TARGETS)
        for i, pair in enumerate(random.values()):  # B = 0 would leave A no gradient
            shape, k = pair["B"].shape, jax.random.key(i)
            pair["B"] = 0.02 * jax.random.normal(k, shape)
        params |= imma.flat_factors(random)
        factors = {
            f"{safetensors_io.torch_name(path)} {part}": tensor(pair[part])
            for path, pair in random.items()
            for part in "AB"
        }
    parts = {"lower": imma.lower_part(params), "upper": psi}
    opt = {k: recorder().init({n: params[n] for n in parts[k]}) for k in parts}
    step = jax.jit(imma.make_step(denoiser, s, psi, recorder(), recorder()))
    state = init_state(params, opt)
    new, metrics = step(state, {"network": frozen}, batch, KEY)

    keys = jax.random.split(jax.random.fold_in(KEY, 0))
    state, trained = {**theirs.start, **factors}, list(factors or theirs.start)

    def loss(q, key):
        unet = {name: q[name] for name in theirs.start}
        chosen = {name: q[name] for name in factors}
        unet = merged(unet, chosen, s.alpha / s.rank)
        return theirs.losses(unet, batch["harmful"], key).mean()

    grads, value = gradient(lambda q: loss(q, keys[0]), state, trained)
    np.testing.assert_allclose(metrics["lower/harmful_loss"], value, rtol=1e-5)
    if inner_attack == "lora":
        for name, g in new.opt["lower"].items():
            _, path, part = name.split(":")
            other = grads[f"{safetensors_io.torch_name(path)} {part}"].numpy()
            assert np.linalg.norm(g - other) < 1e-4 * np.linalg.norm(other), name
    else:
        assert_same(new.opt["lower"], grads)
    state = descended(state, grads)
    grads, value = gradient(lambda q: -loss(q, keys[1]), state, names_of(psi))
    np.testing.assert_allclose(metrics["upper/loss"], value, rtol=1e-4)
    assert_same(new.opt["upper"], grads)


# --- ESD ------------------------------------------------------------------------------


def test_esd(ours, theirs):
    """eps_theta(c) is to be eps_0("") - eta (eps_0(c) - eps_0("")): its equation 7."""
    denoiser, unet, batch = ours
    trainable, frozen = select_trainable(unet, "cross_attention")
    moved = {path: 1.05 * a for path, a in trainable.items()}
    empty, t = batch["safe"]["cond"]["states"][:1], np.asarray([150, 900], np.int32)
    frozen = {"network": frozen, "original": trainable, "empty": {"states": empty}}
    pairs = {"z": batch["harmful"]["mean"], "t": t, "cond": batch["harmful"]["cond"]}
    text = pairs["cond"]["states"]
    loss = esd.make_loss(denoiser, esd.Esd(eta=1.7))
    (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        moved, frozen, pairs
    )

    def eps(params, text):
        return theirs.output(params, tensor(pairs["z"]), t, text)

    with torch.no_grad():
        none = eps(theirs.start, np.repeat(empty, 2, axis=0))
        target = none - 1.7 * (eps(theirs.start, text) - none)
    psi = names_of(trainable)
    student = {n: p * 1.05 if n in psi else p for n, p in theirs.start.items()}
    expected, other = gradient(
        lambda q: (eps(q, text) - target).square().mean(), student, psi
    )
    np.testing.assert_allclose(value, other, rtol=1e-4)
    assert_same(grads, expected)
