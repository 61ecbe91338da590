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
from gift_jax.diffusion import Denoiser

KINDS = ("full", "lora")
Flat = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the simulated attacker fine-tunes; each range is drawn from at every step.

    Attributes: kinds: of KINDS, one drawn at random; empty: no adversary. steps_min,
      steps_max: how many updates, both ends included. lr_min, lr_max: Adam's rate,
      log-uniform; lora_lr_min, lora_lr_max: of LoRA's. rank, alpha: of LoRA.
      unrolled: take gradients through the updates, else only at their end.
      safe_weight: of the safe counterpart in the lower level. horizon: 0: what the
      upper level sees starts anew from the model at every step; else (full) it goes on
      from step to step and starts anew every `horizon` steps on average.
    """

    kinds: tuple[str, ...] = ()
    steps_min: int = 0
    steps_max: int = 4
    lr_min: float = 1e-4
    lr_max: float = 1e-3
    lora_lr_min: float = 1e-3
    lora_lr_max: float = 1e-2
    rank: int = 8
    alpha: float = 8.0
    unrolled: bool = False
    safe_weight: float = 1.0
    horizon: int = 0


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
        rates = {
            "full": _log_uniform(k_lr, s.lr_min, s.lr_max),
            "lora": _log_uniform(k_lr, s.lora_lr_min, s.lora_lr_max),
        }
        steps = jax.random.randint(k_steps, (), s.steps_min, s.steps_max + 1)

        def loss_fn(attacked, k):
            nested = unflatten_dict(attacked, sep="/")
            return jnp.mean(denoiser.losses(nested, abar_T, batch, k)[0])

        def run(kind):
            attack, lr = attacks[kind], rates[kind]
            return lambda unet: attack(s, loss_fn, unet, lr, steps, k_attack)

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


def init_attacker(unet: Flat) -> dict:
    """Returns an attacker that has not moved yet, for `make_pursue`."""
    shift = {path: jnp.zeros(a.shape, _wide(a)) for path, a in unet.items()}
    return {"shift": shift, "opt": _adam().init(shift)}


def make_continue_attack(denoiser: Denoiser, s: Settings) -> Callable:
    """Returns an attack that goes on beside the training: every call some updates more.

    (attacker, every parameter of the UNet, abar, batch of pairs, key) -> attacker; its
    "shift" is how far fine-tuning has moved each parameter from where the model stands.
    A long attack costs a few updates a step, since the model moves little in one.
    """

    def pursue(attacker, unet, abar_T, batch, key):
        k_new, k_lr, k_steps, k_attack = jax.random.split(key, 4)
        lr = _log_uniform(k_lr, s.lr_min, s.lr_max)
        steps = jax.random.randint(k_steps, (), s.steps_min, s.steps_max + 1)
        goes_on = jax.random.uniform(k_new) >= 1.0 / s.horizon
        fresh = init_attacker(unet)
        attacker = jax.tree.map(
            lambda old, new: jnp.where(goes_on, old, new), attacker, fresh
        )

        def loss_fn(shift, k):
            attacked = unflatten_dict(apply_delta(unet, shift), sep="/")
            return jnp.mean(denoiser.losses(attacked, abar_T, batch, k)[0])

        shift, opt = attacker["shift"], attacker["opt"]
        shift, opt = _descend(s, loss_fn, shift, opt, lr, steps, k_attack)
        return {"shift": shift, "opt": opt}

    return pursue


def apply_delta(unet: Flat, shift: Flat) -> Flat:
    """Returns the parameters with a shift added, in their own dtypes."""
    return {path: a + shift[path].astype(a.dtype) for path, a in unet.items()}


def _log_uniform(key, low: float, high: float) -> jax.Array:
    low, high = jnp.log(low), jnp.log(high)
    return jnp.exp(jax.random.uniform(key, (), minval=low, maxval=high))


def _full(s: Settings, loss_fn, unet, lr, steps, key):
    return _descend(s, loss_fn, unet, _adam().init(unet), lr, steps, key)[0]


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

    opt = _adam().init(factors)
    return merged(_descend(s, lora_loss, factors, opt, lr, steps, k_run)[0])


def _wide(array):
    return jnp.promote_types(jnp.float32, array.dtype)


def _adam():
    return optax.scale_by_adam(eps_root=1e-20)  # or unrolled gradients are NaN at 0


def _descend(s: Settings, loss_fn, params, opt, lr, steps, key):
    """Returns (parameters, opt) after `steps` (a traced integer) updates of Adam."""
    adam = _adam()

    def update(carry, part):
        params, opt = carry
        i, k = part
        grads = jax.grad(loss_fn)(params, k)
        updates, opt = adam.update(grads, opt)
        rate = jnp.where(i < steps, lr, 0.0)  # the moments of idle steps are not used
        updates = jax.tree.map(lambda u: -rate * u, updates)
        params = optax.apply_updates(params, updates)
        return (params, opt), None

    keys = jax.random.split(key, s.steps_max)
    carry = params, opt
    if s.unrolled:  # as many always: what is differentiated must have a known length
        count = jnp.arange(s.steps_max)
        carry, _ = jax.lax.scan(jax.checkpoint(update), carry, (count, keys))
    else:
        carry = jax.lax.fori_loop(
            0, steps, lambda i, carry: update(carry, (i, keys[i]))[0], carry
        )
    return carry
