# SPDX-License-Identifier: Apache-2.0
"""An attacker in the loop: fine-tuning simulated inside a step.

A level that is taken at the attacked parameters is about what fine-tuning makes of the
model, not about the model itself: the upper level then degrades what an attacker of
malicious data would reach, and a term of the lower level keeps low what an honest user
would reach with safe data. As ResAlign (arXiv:2507.16302) and APDM (arXiv:2511.01307)
look past the released weights; composed with GIFT's levels, it is ours.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict

from gift_jax.attacks import lora
from gift_jax.methods.denoise import Denoiser

KINDS = ("full", "lora")
Flat = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the simulated attacker fine-tunes; each range is drawn from at every step.

    Attributes: kinds: of KINDS, one drawn at random; empty: no adversary. steps_min,
      steps_max: how many updates, both ends included. lr_min, lr_max: Adam's rate,
      log-uniform. rank, alpha: of LoRA. unrolled: take gradients through the updates,
      else only at their end. safe_weight: of the safe counterpart in the lower level.
    """

    kinds: tuple[str, ...] = ()
    steps_min: int = 0
    steps_max: int = 4
    lr_min: float = 1e-4
    lr_max: float = 1e-3
    rank: int = 8
    alpha: float = 8.0
    unrolled: bool = False
    safe_weight: float = 1.0


# (every parameter of the UNet, abar_T, batch of pairs, key) -> the attacked parameters
Simulate = Callable[[Flat, jax.Array, dict, jax.Array], Flat]


def make_simulate(denoiser: Denoiser, s: Settings) -> Simulate:
    """Returns the simulated attack, pure and differentiable.

    Takes the UNet's flat parameters and returns them as `steps` Adam updates on the
    batch's pairs leave them, timesteps and noise drawn anew for each. Not unrolled, the
    attack counts as a constant shift: the gradient at the attacked parameters is the
    gradient with respect to those that were given.
    """
    attacks = {"full": _full, "lora": _lora}

    def simulate(unet, abar_T, batch, key):
        k_kind, k_lr, k_steps, k_attack = jax.random.split(key, 4)
        low, high = jnp.log(s.lr_min), jnp.log(s.lr_max)
        lr = jnp.exp(jax.random.uniform(k_lr, (), minval=low, maxval=high))
        steps = jax.random.randint(k_steps, (), s.steps_min, s.steps_max + 1)

        def loss_fn(attacked, k):
            nested = unflatten_dict(attacked, sep="/")
            return jnp.mean(denoiser.losses(nested, abar_T, batch, k)[0])

        def run(kind):
            return lambda unet: attacks[kind](s, loss_fn, unet, lr, steps, k_attack)

        start = unet if s.unrolled else jax.lax.stop_gradient(unet)
        if len(s.kinds) == 1:
            attacked = run(s.kinds[0])(start)
        else:
            which = jax.random.randint(k_kind, (), 0, len(s.kinds))
            attacked = jax.lax.switch(which, [run(kind) for kind in s.kinds], start)
        if s.unrolled:
            return attacked
        return {path: unet[path] + (attacked[path] - start[path]) for path in unet}

    return simulate


def _full(s: Settings, loss_fn, unet, lr, steps, key):
    return _descend(s, loss_fn, unet, lr, steps, key)


def _lora(s: Settings, loss_fn, unet, lr, steps, key):
    k_init, k_run = jax.random.split(key)
    factors = {
        path: jax.tree.map(lambda f, path=path: f.astype(_wide(unet[path])), pair)
        for path, pair in lora.init(k_init, unet, s.rank).items()
    }

    def merged(factors):
        return lora.apply(unet, factors, s.alpha / s.rank)

    def lora_loss(factors, k):
        return loss_fn(merged(factors), k)

    return merged(_descend(s, lora_loss, factors, lr, steps, k_run))


def _wide(array):
    return jnp.promote_types(jnp.float32, array.dtype)


def _descend(s: Settings, loss_fn, params, lr, steps, key):
    """Returns the parameters after `steps` (a traced integer) updates of Adam."""
    adam = optax.scale_by_adam(eps_root=1e-20)  # or unrolled gradients are NaN at 0

    def update(carry, part):
        params, opt = carry
        i, k = part
        grads = jax.grad(loss_fn)(params, k)
        updates, opt = adam.update(grads, opt)
        rate = jnp.where(i < steps, lr, 0.0)  # the moments of idle steps are not used
        updates = jax.tree.map(lambda u: -rate * u, updates)
        params = optax.apply_updates(params, updates)
        return (params, opt), None

    count = jnp.arange(s.steps_max)
    keys = jax.random.split(key, s.steps_max)
    start = params, adam.init(params)
    (params, _), _ = jax.lax.scan(jax.checkpoint(update), start, (count, keys))
    return params
