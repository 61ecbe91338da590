# SPDX-License-Identifier: Apache-2.0
"""From a config to what the loop runs: one plan a method of `gift_jax.train`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict

from gift_jax import config, job, losses
from gift_jax.attacks import lora
from gift_jax.loop import Step
from gift_jax.methods import adversary, gift, imma
from gift_jax.models import hooks, partition

LEVELS = ("lower", "upper")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a method makes of a model.

    Attributes: step: of the loop's contract. params: what trains, flat, float32.
      frozen: the UNet's other parameters, flat, in the compute dtype. opt: the
      optimisers' states. sizes: pairs a step of each data group. psi: paths of `params`
      that are exported.
    """

    step: Step
    params: dict[str, jax.Array]
    frozen: dict[str, jax.Array]
    opt: dict[str, Any]
    sizes: dict[str, int]
    psi: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Method:
    """A defence. groups: of data that it reads. check: cfg -> its settings, before the
    model is loaded. plan: (cfg, settings, model) -> Plan.
    """

    groups: tuple[str, ...]
    check: Callable
    plan: Callable


# --- GIFT and its ablations -----------------------------------------------------------


def check_gift(cfg) -> gift.Settings:
    """Returns GIFT's settings, every field checked; UserError names the field."""
    g = cfg.gift
    config.choice("config.gift.gradient", g.gradient, gift.GRADIENTS)
    config.choice("config.gift.bound", g.bound, losses.BOUNDS)
    config.choice("config.gift.noise_target", g.noise_target, losses.NOISE_TARGETS)
    config.choice("config.gift.distance", g.distance, losses.DISTANCES)
    if g.beta and not g.layers:
        raise config.UserError(
            "config.gift.layers is empty; name a kind of layer, or set "
            "--config.gift.beta=0"
        )
    for layer in g.layers:
        config.choice("config.gift.layers", layer, tuple(hooks.CAPTURE_KINDS))
    for name, low in (("inner_steps", 0), ("outer_steps", 1), ("beta", 0), ("cap", 0)):
        config.at_least(f"config.gift.{name}", g[name], low)
    return _settings(gift.Settings, g, attack=check_adversary(cfg.adversary))


def check_maximize_prior(cfg) -> gift.Settings:
    """MIMA's outer loss (arXiv:2412.15320): GIFT without representation noising."""
    return dataclasses.replace(check_gift(cfg), beta=0.0)


def check_maximize(cfg) -> gift.Settings:
    """Ascent alone: neither noising nor a lower level."""
    return dataclasses.replace(
        check_gift(cfg), beta=0.0, inner_steps=0, gradient="first_order"
    )


def check_adversary(a) -> adversary.Settings:
    """Returns the simulated attacker's settings; UserError names the field."""
    for kind in a.kinds:
        config.choice("config.adversary.kinds", kind, adversary.KINDS)
    lows = {"steps_min": 0, "steps_max": 1, "lr_min": 1e-12, "lr_max": 1e-12}
    lows |= {"rank": 1, "safe_weight": 0}
    for name, low in lows.items():
        config.at_least(f"config.adversary.{name}", a[name], low)
    for name in ("steps", "lr"):
        low, high = f"{name}_min", f"{name}_max"
        if a[low] > a[high]:
            raise config.UserError(
                f"config.adversary.{low}={a[low]} must be at most {high}={a[high]}"
            )
    if not a.alpha > 0:
        raise config.UserError(
            f"config.adversary.alpha={a.alpha} must be above 0; try {a.rank}"
        )
    return _settings(adversary.Settings, a)


def plan_gift(cfg, s: gift.Settings, model) -> Plan:
    """Returns the plan of GIFT, `maximize_prior` or `maximize`."""
    parts = job.split_unet(model, cfg.trainable)
    tx = _optimizers(cfg, s)
    step = gift.make_step(job.denoiser(model), s, tx["lower"], tx["upper"])
    opt = {level: tx[level].init(parts.trainable) for level in LEVELS}
    sizes = {
        "harmful": cfg.harmful.batch * s.outer_steps,
        "safe": cfg.safe.batch * max(1, s.inner_steps),
    }
    return Plan(step, parts.trainable, parts.frozen, opt, sizes, tuple(parts.trainable))


# --- IMMA -----------------------------------------------------------------------------


def check_imma(cfg) -> imma.Settings:
    """Returns IMMA's settings, every field checked; UserError names the field."""
    m = cfg.imma
    config.choice("config.imma.lower", m.lower, imma.LOWER)
    config.choice("config.imma.bound", m.bound, losses.BOUNDS)
    for name, low in (("inner_steps", 0), ("outer_steps", 1), ("cap", 0), ("rank", 1)):
        config.at_least(f"config.imma.{name}", m[name], low)
    few, many = sorted((max(1, m.inner_steps), m.outer_steps))
    if many % few:
        raise config.UserError(
            f"config.imma.inner_steps={m.inner_steps} and outer_steps={m.outer_steps} "
            "share their pairs: one must divide by the other"
        )
    if not m.alpha > 0:
        raise config.UserError(
            f"config.imma.alpha={m.alpha} must be above 0; try {m.rank}"
        )
    return _settings(imma.Settings, m)


def plan_imma(cfg, s: imma.Settings, model) -> Plan:
    """Returns the plan of IMMA."""
    flat = flatten_dict(model.params["unet"], sep="/")
    psi = tuple(partition.select(flat, cfg.trainable)[0])
    wanted = flat if s.lower == "dreambooth" else psi
    # Copies: the loop donates them, and the model's own are still to be drawn with.
    params = jax.tree.map(jnp.array, job.float32_unet(model, wanted))
    frozen = {path: flat[path] for path in flat if path not in params}
    if s.lower == "lora":
        key = jax.random.fold_in(jax.random.key(cfg.seed), 2)
        params |= imma.flat_factors(lora.init(key, flat, s.rank))
    tx = _optimizers(cfg, s)
    step = imma.make_step(job.denoiser(model), s, psi, tx["lower"], tx["upper"])
    parts = {"lower": imma.lower_part(params), "upper": psi}
    opt = {
        level: tx[level].init({name: params[name] for name in parts[level]})
        for level in LEVELS
    }
    sizes = {"harmful": cfg.harmful.batch * max(s.inner_steps, s.outer_steps)}
    return Plan(step, params, frozen, opt, sizes, psi)


def plan_finetune(cfg, model, params):
    """Returns (step, optimiser states) of ordinary fine-tuning on safe pairs."""
    tx = job.optimizer(cfg.post_finetune, cfg.post_finetune.steps, "post_finetune")
    loss = gift.make_lower_loss(job.denoiser(model), gift.Settings())
    update = gift.make_level("lower", loss, tx)

    def finetune_step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        args = state.params, state.opt["lower"], frozen, batch["safe"], key
        params, opt, metrics = update(*args)
        state = state.replace(step=state.step + 1, params=params, opt={"lower": opt})
        return state, metrics

    return finetune_step, {"lower": tx.init(params)}


METHODS = {
    "gift": Method(("harmful", "safe"), check_gift, plan_gift),
    "maximize_prior": Method(("harmful", "safe"), check_maximize_prior, plan_gift),
    "maximize": Method(("harmful", "safe"), check_maximize, plan_gift),
    "imma": Method(("harmful",), check_imma, plan_imma),
}


def _optimizers(cfg, s) -> dict[str, optax.GradientTransformation]:
    counts = {"lower": s.inner_steps, "upper": s.outer_steps}
    return {
        level: job.optimizer(cfg[level], cfg.steps * counts[level], level)
        for level in LEVELS
    }


def _settings(cls, group, **others):
    names = [f.name for f in dataclasses.fields(cls) if f.name not in others]
    return cls(**{name: group[name] for name in names}, **others)
