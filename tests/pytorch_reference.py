# SPDX-License-Identifier: Apache-2.0
"""Losses and gradients of a UNet by PyTorch, to compare steps with.

Both sides get the same weights, pairs, noise and timesteps. A recording SGD stands for
an optimizer, so that one step yields the gradient.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax_names import flax_name

from gift_jax.diffusion import normal_like, timesteps
from gift_jax.models import safetensors_io

torch = pytest.importorskip("torch")

RATE = 0.02  # of every level


def recorder():
    """SGD at `RATE` whose state is the last gradient."""

    def update(grads, _state, _params=None):
        return jax.tree.map(lambda g: -RATE * g, grads), grads

    return optax.GradientTransformation(
        lambda p: jax.tree.map(jnp.zeros_like, p), update
    )


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
        text = text if torch.is_tensor(text) else tensor(text)
        args = z_t, tensor(t), text
        return torch.func.functional_call(self.unet, params, args).sample

    def outputs(self, params, pairs, key):
        """eps_theta(z_t, t, c) of each pair and eps, noise drawn from the key."""
        k_z, k_eps, k_t = jax.random.split(key, 3)
        mean = jnp.asarray(pairs["mean"])
        noise, eps = normal_like(k_z, mean), normal_like(k_eps, mean)
        t = timesteps(k_t, len(mean), len(self.abar))
        z = tensor(mean + pairs["std"] * noise)
        eps, abar = tensor(eps), self.abar[tensor(t).long()]
        abar = abar.reshape(-1, 1, 1, 1)
        z_t = abar.sqrt() * z + (1 - abar).sqrt() * eps
        out = self.output(params, z_t, t, pairs["cond"]["states"])
        return out, eps

    def losses(self, params, pairs, key):
        """|eps - eps_theta(z_t, t, c)|^2 of each pair, noise drawn from the key."""
        out, eps = self.outputs(params, pairs, key)
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


def gradient(loss, params, names):
    """{name: d loss(params) / d params[name]} and the loss, by PyTorch."""
    leaves = {name: params[name].clone().requires_grad_() for name in names}
    value = loss({**params, **leaves})
    grads = torch.autograd.grad(value, list(leaves.values()))
    return dict(zip(leaves, grads, strict=True)), value.item()


def assert_same(grads, expected, tolerance=1e-4):
    """Same names, each within a part of the other's norm."""
    ours = {
        safetensors_io.torch_name(path): safetensors_io.to_torch_layout(
            path, np.asarray(g)
        )
        for path, g in grads.items()
    }
    assert set(ours) == set(expected)
    scale = max(float(g.norm()) for g in expected.values())
    assert scale > 1e-4
    for name, other in expected.items():
        error = np.linalg.norm(ours[name] - other.numpy())
        assert error < tolerance * max(float(other.norm()), 1e-3 * scale), name


def names_of(paths):
    return [safetensors_io.torch_name(path) for path in paths]


def descended(params, grads):
    return {**params, **{name: params[name] - RATE * g for name, g in grads.items()}}


def merged(params, factors, scale):
    out = dict(params)
    for name in {n[:-2] for n in factors}:
        delta = (factors[f"{name} A"] @ factors[f"{name} B"]).T
        out[name] = params[name] + scale * delta
    return out
