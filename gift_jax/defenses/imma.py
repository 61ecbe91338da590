# SPDX-License-Identifier: Apache-2.0
"""IMMA (Zheng & Yeh, ECCV 2024, arXiv:2311.18815): immunization against adaptation.

    lower:  phi <- phi - lr * grad L(D_m)            the attack's own fine-tuning
    upper:  psi <- psi + lr * grad L(D_m)            by the attention parameters alone

in turn, first-order, as the released code does. phi is every parameter of the network
(DreamBooth) or LoRA factors; of what the lower level did to it only the part inside psi
is kept in the end, since psi alone is exported.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from gift_jax.attacks import lora
from gift_jax.defenses import base, objectives
from gift_jax.diffusion import Denoiser
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError
from gift_jax.state import Step, make_update, repeat_update

INNER_ATTACKS = ("dreambooth", "lora")
_LORA = "lora:"  # marks a LoRA factor among the trained parameters


@dataclasses.dataclass(frozen=True)
class Imma:
    """The fields of IMMA."""

    inner_attack: str = config.choice(
        "dreambooth", INNER_ATTACKS, "what the lower level trains"
    )
    inner_steps: int = config.number(1, low=0, doc="lower-level updates a step")
    outer_steps: int = config.number(1, low=1, doc="upper-level updates a step")
    ascent_bound: str = config.choice(
        "raw", objectives.BOUNDS, "limit on the ascent; none as published"
    )
    ascent_cap: float = config.number(
        20.0, low=0, doc="hinge: an example whose loss is above this has no gradient"
    )
    rank: int = config.number(4, low=1, doc="of inner_attack=lora")
    alpha: float = config.number(4.0, above=0, doc="of inner_attack=lora")

    def check(self, field: str) -> None:
        few, many = sorted((max(1, self.inner_steps), self.outer_steps))
        if many % few:
            raise UserError(
                f"{field}.inner_steps={self.inner_steps} and outer_steps="
                f"{self.outer_steps} share their pairs: one must divide by the other"
            )


def flat_factors(factors: lora.Factors) -> dict[str, jax.Array]:
    """Returns LoRA factors as flat entries of State.params."""
    return {
        f"{_LORA}{path}:{part}": array
        for path, pair in factors.items()
        for part, array in pair.items()
    }


def _factors(params) -> lora.Factors:
    factors: lora.Factors = {}
    for name, array in params.items():
        if match := re.fullmatch(rf"{_LORA}(.*):(A|B)", name):
            factors.setdefault(match[1], {})[match[2]] = array
    return factors


def network_part(params) -> dict[str, jax.Array]:
    """Returns State.params without LoRA factors."""
    return {k: v for k, v in params.items() if not k.startswith(_LORA)}


def make_step(
    denoiser: Denoiser,
    s: Imma,
    exported: tuple[str, ...],
    tx_lower: optax.GradientTransformation,
    tx_upper: optax.GradientTransformation,
    concepts: tuple[str, ...] = (),
    micro_batches: int = 1,
) -> Step:
    """Returns IMMA's step.

    state.params: psi's flat parameters and what the lower level trains besides (the
    rest of the network, or `flat_factors`); state.opt: {"lower", "upper"}, the first
    over `lower_part` of the parameters, the second over psi. frozen: {"network":
    its other flat parameters}. batch: {"harmful": max(inner_steps, outer_steps)
    * B pairs}; both levels see the same ones, as in the published code.

    Args: exported: psi's paths. concepts: names, to log the loss of each of several.
    """
    scale = s.alpha / s.rank

    def network_of(params, frozen):
        factors = _factors(params)
        network = {**frozen["network"], **network_part(params)}
        return unflatten_dict(lora.apply(network, factors, scale), sep="/")

    def lower_loss(part, fixed, batch, key):
        network = network_of({**fixed["rest"], **part}, fixed)
        loss = jnp.mean(denoiser.losses(network, batch, key)[0])
        return loss, {"lower/harmful_loss": loss}

    def upper_loss(part, fixed, batch, key):
        network = network_of({**fixed["rest"], **part}, fixed)
        loss_B, _ = denoiser.losses(network, batch, key)
        total = objectives.bounded_ascent(loss_B, s.ascent_bound, s.ascent_cap)
        metrics = {"upper/loss": total, "upper/harmful_loss": jnp.mean(loss_B)}
        if concepts:
            metrics |= objectives.losses_by_concept(loss_B, batch["concept"], concepts)
        return total, metrics

    def level(name, loss, tx, steps):
        return repeat_update(make_update(name, loss, tx, micro_batches), steps)

    lower = level("lower", lower_loss, tx_lower, s.inner_steps)
    upper = level("upper", upper_loss, tx_upper, s.outer_steps)

    def imma_step(state, frozen, batch, key):
        keys = jax.random.split(jax.random.fold_in(key, state.step))
        params, opt, metrics = dict(state.params), dict(state.opt), {}
        for name, run, names, k in (
            ("lower", lower, lower_part(params), keys[0]),
            ("upper", upper, exported, keys[1]),
        ):
            part = {n: params[n] for n in names}
            rest = {n: a for n, a in params.items() if n not in part}
            fixed = {**frozen, "rest": rest}
            part, opt[name], new = run(part, opt[name], fixed, batch["harmful"], k)
            params.update(part)
            metrics |= new
        return state.replace(step=state.step + 1, params=params, opt=opt), metrics

    return imma_step


def lower_part(params) -> tuple[str, ...]:
    """Returns the names that the lower level trains: the factors if there are any."""
    factors = tuple(name for name in params if name.startswith(_LORA))
    return factors or tuple(params)


def plan(task: base.Task) -> base.Plan:
    """Returns the plan of IMMA."""
    s, model, run = task.settings, task.model, task.run
    flat: dict[str, Any] = flatten_dict(model.denoiser_params, sep="/")
    exported = tuple(model.split(run.trainable).trainable)
    is_whole = s.inner_attack == "dreambooth"
    names = model.trainable_paths("all") if is_whole else exported
    # Copies: the loop donates them, and the model's own are still to be drawn with.
    own = model.float32_params(model.denoiser_component, names)
    params = jax.tree.map(jnp.array, own)
    frozen = {path: flat[path] for path in flat if path not in params}
    if s.inner_attack == "lora":
        key = task.key("init")
        params |= flat_factors(lora.init(key, flat, s.rank, model.lora_targets))
    tx_lower = task.optimizer("lower", s.inner_steps)
    tx_upper = task.optimizer("upper", s.outer_steps)
    lower = {name: params[name] for name in lower_part(params)}
    return base.Plan(
        step=make_step(
            model.denoiser,
            s,
            exported,
            tx_lower,
            tx_upper,
            task.concepts,
            run.hardware.grad_accum_steps,
        ),
        params=params,
        frozen={"network": frozen},
        opt={
            "lower": tx_lower.init(lower),
            "upper": tx_upper.init({name: params[name] for name in exported}),
        },
        sizes={
            "harmful": task.batch_size("harmful") * max(s.inner_steps, s.outer_steps)
        },
        exported=exported,
    )


DEFENSE = base.Defense(
    config=Imma,
    title="IMMA (arXiv:2311.18815)",
    plan=plan,
    groups=("harmful",),
    exported=lambda params, paths: {path: params[path] for path in paths},
    worst_case="100% after DreamBooth by the concept's name, as without a defense",
)
