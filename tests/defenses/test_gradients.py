# SPDX-License-Identifier: Apache-2.0
"""Every method's gradients on emoji-sd against PyTorch, from the papers' equations.

Both sides get the same weights, pairs, noise and timesteps. A recording SGD stands for
the optimisers, so that one step of a method yields the gradient of each of its levels,
the second taken where the first one's update has led.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from flax_names import flax_name

from gift_jax.attacks import lora
from gift_jax.defenses import base as defenses_base
from gift_jax.defenses import esd, gift, imma
from gift_jax.diffusion import normal_like, timesteps
from gift_jax.models import safetensors_io
from gift_jax.models.load import load_model, make_denoiser
from gift_jax.models.sd import stable_diffusion
from gift_jax.models.trainable import select_trainable
from gift_jax.runtime.config import load_config
from gift_jax.state import init_state

torch = pytest.importorskip("torch")

KEY = jax.random.key(11)
RATE = 0.02  # of both levels
ADAM_RATE = 1e-3  # of the simulated attack: it moves every weight by about this


def recorder():
    """SGD at `RATE` whose state is the last gradient."""

    def update(grads, _state, _params=None):
        return jax.tree.map(lambda g: -RATE * g, grads), grads

    return optax.GradientTransformation(
        lambda p: jax.tree.map(jnp.zeros_like, p), update
    )


@pytest.fixture(scope="module")
def emoji():
    return load_model("emoji-sd")


@pytest.fixture(scope="module")
def ours(emoji):
    """(denoiser, every parameter of the UNet, abar, batch of two pairs a level)."""
    rng = np.random.default_rng(3)
    width = emoji.text_encoder.config.hidden_size

    def pairs():
        shape = 2, *emoji.latent_shape
        return {
            "mean": rng.normal(size=shape).astype(np.float32),
            "std": rng.uniform(0.01, 0.1, size=shape).astype(np.float32),
            "text": rng.normal(size=(2, emoji.max_length, width)).astype(np.float32),
        }

    unet = flatten_dict(emoji.params["unet"], sep="/")
    abar = stable_diffusion.noise_schedule(emoji)
    return make_denoiser(emoji), unet, abar, {"safe": pairs(), "harmful": pairs()}


def tensor(array):
    return torch.tensor(np.array(array))


class Theirs:
    """PyTorch's UNet as a function of its parameters, and the losses of the papers."""

    def __init__(self, folder, abar):
        from diffusers import UNet2DConditionModel

        self.unet = UNet2DConditionModel.from_pretrained(str(folder / "unet")).eval()
        self.abar = tensor(abar)
        self.start = {
            name: p.detach().clone() for name, p in self.unet.named_parameters()
        }
        self.hiddens = {}
        for name, module in self.unet.named_modules():
            if type(module).__name__ == "BasicTransformerBlock":
                module.register_forward_hook(
                    lambda _m, _i, out, name=name: self.hiddens.update({name: out})
                )

    def output(self, params, z_t, t, text):
        args = z_t, tensor(t), tensor(text)
        return torch.func.functional_call(self.unet, params, args).sample

    def losses(self, params, pairs, key):
        """|eps - eps_theta(z_t, t, c)|^2 of each pair, noise drawn from the key."""
        k_z, k_eps, k_t = jax.random.split(key, 3)
        mean = jnp.asarray(pairs["mean"])
        noise, eps = normal_like(k_z, mean), normal_like(k_eps, mean)
        t = timesteps(k_t, len(mean), len(self.abar))
        z = tensor(mean + pairs["std"] * noise)
        eps, abar = tensor(eps), self.abar[tensor(t).long()]
        abar = abar.reshape(-1, 1, 1, 1)
        z_t = abar.sqrt() * z + (1 - abar).sqrt() * eps
        out = self.output(params, z_t, t, pairs["text"])
        return (out - eps).square().mean(dim=(1, 2, 3))

    def noising(self, key, target):
        """Mean over the blocks of |h - noise|^2, of the last forward pass.

        Noise: N(0, I), or "matched", with each channel's own mean and deviation.
        """
        names = sorted(self.hiddens, key=flax_name)
        total = 0.0
        for k, name in zip(jax.random.split(key, len(names)), names, strict=True):
            h = self.hiddens[name]
            noise = tensor(normal_like(k, jnp.zeros(h.shape)))
            if target == "matched":
                channels = h.detach().flatten(0, -2)
                noise = channels.mean(0) + channels.std(0, correction=0) * noise
            total = total + (h - noise).square().mean()
        return total / len(names)


@pytest.fixture(scope="module")
def theirs(emoji, ours):
    return Theirs(emoji.path, ours[2])


def gradient(loss, params, names):
    """{name: d loss(params) / d params[name]} and the loss, by PyTorch."""
    leaves = {name: params[name].clone().requires_grad_() for name in names}
    value = loss({**params, **leaves})
    grads = torch.autograd.grad(value, list(leaves.values()))
    return dict(zip(leaves, grads, strict=True)), value.item()


# An attacker's Adam divides gradients near zero by their size, and so magnifies what
# they were rounded by: PyTorch in float32 is itself 1.0e-4 from PyTorch in float64.
AFTER_ADAM = 3e-4


def assert_same(grads, expected, tolerance=1e-4):
    """Same names, each within a part of the other's norm."""
    found = {
        safetensors_io.torch_name(path): safetensors_io.to_torch_layout(
            path, np.asarray(g)
        )
        for path, g in grads.items()
    }
    assert set(found) == set(expected)
    scale = max(float(g.norm()) for g in expected.values())
    assert scale > 1e-4
    for name, other in expected.items():
        error = np.linalg.norm(found[name] - other.numpy())
        assert error < tolerance * max(float(other.norm()), 1e-3 * scale), name


def names_of(paths):
    return [safetensors_io.torch_name(path) for path in paths]


def descended(params, grads):
    return {**params, **{name: params[name] - RATE * g for name, g in grads.items()}}


def settings(method, **fields):
    """The method's settings as the command line makes them."""
    cfg = load_config("configs/emoji_gift.py:plain")
    cfg.update_from_flattened_dict(fields)
    return defenses_base.DEFENSES[method].check(cfg)


# --- GIFT, its ablations and its adversary --------------------------------------------

ATTACK = {
    "adversary.steps_min": 2,
    "adversary.steps_max": 2,
    "adversary.lr_min": ADAM_RATE,
    "adversary.lr_max": ADAM_RATE,
    "adversary.lora_lr_min": ADAM_RATE,
    "adversary.lora_lr_max": ADAM_RATE,
    "adversary.safe_weight": 0.5,
}
AT_UPPER = ATTACK | {"adversary.safe_weight": 0.0}  # alone, as in emoji_gift.py
CASES = {
    "gift": ("gift", {"gift.beta": 0.5, "gift.bound": "log"}),  # noise is matched
    "standard": ("gift", {"gift.beta": 0.5, "gift.noise_target": "standard"}),
    "maximize_prior": ("maximize_prior", {"gift.cap": 1e3}),
    "maximize": ("maximize", {"gift.bound": "raw"}),
    "full": ("gift", {"gift.beta": 0.0, "adversary.kinds": ("full",), **AT_UPPER}),
    "full_both": ("gift", {"gift.beta": 0.0, "adversary.kinds": ("full",), **ATTACK}),
    "lora": ("gift", {"gift.beta": 0.0, "adversary.kinds": ("lora",), **ATTACK}),
}


def attacked(theirs, s, params, pairs, key):
    """What the simulated attacker makes of the parameters: constants to a gradient."""
    _, _, _, k_attack = jax.random.split(key, 4)
    state = params
    if s.kinds == ("lora",):
        k_init, k_attack = jax.random.split(k_attack)
        state = torch_factors(k_init, params, s.rank)

    def unet_of(state):
        if s.kinds != ("lora",):
            return state
        return merged(params, state, s.alpha / s.rank)

    moments = {name: (0.0, 0.0) for name in state}
    for i, k in enumerate(jax.random.split(k_attack, s.steps_max)):
        grads, _ = gradient(
            lambda q, k=k: theirs.losses(unet_of(q), pairs, k).mean(), state, state
        )
        state = dict(state)
        for name, g in grads.items():  # Kingma & Ba 2015, algorithm 1
            m, v = moments[name]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g.square()
            moments[name] = m, v
            m, v = m / (1 - 0.9 ** (i + 1)), v / (1 - 0.999 ** (i + 1))
            state[name] = state[name] - s.lr_max * m / (v.sqrt() + 1e-8)
    return {name: value.detach() for name, value in unet_of(state).items()}


def torch_factors(key, params, rank):
    """LoRA's random start, "name A" and "name B", as the key has it."""
    kernels = {
        path: jnp.zeros(params[name].T.shape)
        for path, name in PATHS.items()
        if ".attn" in name and name.endswith("weight") and params[name].ndim == 2
    }
    state = {}
    for path, pair in lora.init(key, kernels, rank).items():
        for part in "AB":
            state[f"{PATHS[path]} {part}"] = tensor(pair[part])
    return state


PATHS = {}  # Flax path -> PyTorch name; filled by `paths`


@pytest.fixture(autouse=True)
def paths(ours):
    PATHS.update({path: safetensors_io.torch_name(path) for path in ours[1]})


def merged(params, factors, scale):
    out = dict(params)
    for name in {n[:-2] for n in factors}:
        delta = (factors[f"{name} A"] @ factors[f"{name} B"]).T
        out[name] = params[name] + scale * delta
    return out


# LoRA's factors are in IMMA's test, the noise in GIFT's, and an attack costs a minute
SLOW = ("full_both", "lora", "standard")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CASES],
)
def test_gift_and_its_kin(ours, theirs, case):
    denoiser, unet, abar, batch = ours
    s = settings(CASES[case][0], **CASES[case][1])
    tolerance = AFTER_ADAM if s.attack.kinds else 1e-4
    trainable, frozen = select_trainable(unet, "cross_attention")
    psi = names_of(trainable)
    step = jax.jit(gift.make_step(denoiser, s, recorder(), recorder()))
    opt = {level: recorder().init(trainable) for level in ("lower", "upper")}
    state = init_state(trainable, opt)
    new, metrics = step(state, {"unet": frozen, "abar": abar}, batch, KEY)

    k_lower, k_upper = jax.random.split(jax.random.fold_in(KEY, 0))
    params = theirs.start

    def shifted(pairs, key):
        """The attack's shift from where the level stands, a constant."""
        if not s.attack.kinds or (pairs is batch["safe"] and not s.attack.safe_weight):
            return None
        after = attacked(theirs, s.attack, params, pairs, key)
        assert max(float((after[n] - params[n]).abs().max()) for n in params) > 1e-4
        return {name: after[name] - params[name] for name in params}

    def there(params, shift):
        return {n: p + shift[n] for n, p in params.items()} if shift else params

    if s.inner_steps:
        k_attack, k_after = jax.random.split(jax.random.fold_in(k_lower, 1))
        shift = shifted(batch["safe"], k_attack)

        def lower(q):
            loss = theirs.losses(q, batch["safe"], k_lower).mean()
            if shift is None:
                return loss
            learned = theirs.losses(there(q, shift), batch["safe"], k_after).mean()
            return loss + s.attack.safe_weight * learned

        grads, _ = gradient(lower, params, psi)
        assert_same(new.opt["lower"], grads, tolerance)
        params = descended(params, grads)

    k_loss, k_noise = jax.random.split(k_upper)
    shift = shifted(batch["harmful"], jax.random.fold_in(k_upper, 1))

    def upper(q):
        loss = theirs.losses(there(q, shift), batch["harmful"], k_loss)
        ascent = {
            "raw": -loss.mean(),
            "log": -(1 + loss).log().mean(),
            "hinge": -loss.clamp(max=s.cap).mean(),
        }[s.bound]
        return ascent + (
            s.beta * theirs.noising(k_noise, s.noise_target) if s.beta else 0.0
        )

    grads, value = gradient(upper, params, psi)
    assert_same(new.opt["upper"], grads, tolerance)
    np.testing.assert_allclose(metrics["upper/loss"], value, rtol=1e-4)
    assert ("lower/loss" in metrics) == bool(s.inner_steps)


# --- IMMA -----------------------------------------------------------------------------


@pytest.mark.parametrize("lower", imma.LOWER)
def test_imma(ours, theirs, lower):
    denoiser, unet, abar, batch = ours
    s = imma.Settings(lower=lower, rank=2, alpha=3.0)  # raw, as published
    psi = tuple(select_trainable(unet, "attention")[0])
    params, frozen, factors = dict(unet), {}, {}
    k_init = jax.random.key(2)
    if lower == "lora":
        params = {path: unet[path] for path in psi}
        frozen = {path: a for path, a in unet.items() if path not in params}
        random = lora.init(k_init, unet, 2)
        for i, pair in enumerate(random.values()):  # B = 0 would leave A no gradient
            shape, k = pair["B"].shape, jax.random.key(i)
            pair["B"] = 0.02 * jax.random.normal(k, shape)
        params |= imma.flat_factors(random)
        factors = {
            f"{PATHS[path]} {part}": tensor(pair[part])
            for path, pair in random.items()
            for part in "AB"
        }
    parts = {"lower": imma.lower_part(params), "upper": psi}
    opt = {k: recorder().init({n: params[n] for n in parts[k]}) for k in parts}
    step = jax.jit(imma.make_step(denoiser, s, psi, recorder(), recorder()))
    state = init_state(params, opt)
    new, metrics = step(state, {"unet": frozen, "abar": abar}, batch, KEY)

    keys = jax.random.split(jax.random.fold_in(KEY, 0))
    state, trained = {**theirs.start, **factors}, list(factors or theirs.start)

    def loss(q, key):
        unet = {name: q[name] for name in theirs.start}
        chosen = {name: q[name] for name in factors}
        unet = merged(unet, chosen, s.alpha / s.rank)
        return theirs.losses(unet, batch["harmful"], key).mean()

    grads, value = gradient(lambda q: loss(q, keys[0]), state, trained)
    np.testing.assert_allclose(metrics["lower/malicious_loss"], value, rtol=1e-5)
    if lower == "lora":
        for name, g in new.opt["lower"].items():
            _, path, part = name.split(":")
            other = grads[f"{PATHS[path]} {part}"].numpy()
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
    denoiser, unet, abar, batch = ours
    trainable, frozen = select_trainable(unet, "cross_attention")
    moved = {path: 1.05 * a for path, a in trainable.items()}
    empty, t = batch["safe"]["text"][:1], np.asarray([150, 900], np.int32)
    frozen = {"unet": frozen, "abar": abar, "original": trainable, "empty": empty}
    pairs = {"z": batch["harmful"]["mean"], "t": t, "text": batch["harmful"]["text"]}
    loss = esd.make_loss(denoiser, esd.Settings(eta=1.7))
    (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        moved, frozen, pairs
    )

    def eps(params, text):
        return theirs.output(params, tensor(pairs["z"]), t, text)

    with torch.no_grad():
        none = eps(theirs.start, np.repeat(empty, 2, axis=0))
        wanted = none - 1.7 * (eps(theirs.start, pairs["text"]) - none)
    psi = names_of(trainable)
    student = {n: p * 1.05 if n in psi else p for n, p in theirs.start.items()}
    expected, other = gradient(
        lambda q: (eps(q, pairs["text"]) - wanted).square().mean(), student, psi
    )
    np.testing.assert_allclose(value, other, rtol=1e-4)
    assert_same(grads, expected)
