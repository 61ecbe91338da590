# SPDX-License-Identifier: Apache-2.0
"""IMMA (Zheng & Yeh, ECCV 2024, arXiv:2311.18815): immunization against adaptation.

    lower:  phi <- phi - lr * grad L(D_m)            the attack's own fine-tuning
    upper:  psi <- psi + lr * grad L(D_m)            by the attention parameters alone

in turn, first-order, as the released code does. phi is every UNet parameter
(DreamBooth) or LoRA factors; of what the lower level did to the UNet only its part
inside psi is kept in the end, since psi alone is exported.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict

from gift_jax.attacks import lora
from gift_jax.defenses import gift, objectives
from gift_jax.diffusion import Denoiser
from gift_jax.state import Step

LOWER = ("dreambooth", "lora")
_LORA = "lora:"  # marks a LoRA factor among the trained parameters


@dataclasses.dataclass(frozen=True)
class Settings:
    """Attributes: lower: of LOWER. inner_steps, outer_steps: updates of each level in a
    step. bound, cap: of the ascent, see `losses.bounded_ascent`; the code's is raw.
    rank, alpha: of LOWER's lora. accumulate: see `losses.in_parts`. concepts: names of
    the malicious ones, to log the loss of each of several.
    """

    lower: str = "dreambooth"
    inner_steps: int = 1
    outer_steps: int = 1
    bound: str = "raw"
    cap: float = 0.0
    rank: int = 4
    alpha: float = 4.0
    accumulate: int = 1
    concepts: tuple[str, ...] = ()


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
        if found := re.fullmatch(rf"{_LORA}(.*):(A|B)", name):
            factors.setdefault(found[1], {})[found[2]] = array
    return factors


def unet_part(params) -> dict[str, jax.Array]:
    """Returns State.params without LoRA factors."""
    return {k: v for k, v in params.items() if not k.startswith(_LORA)}


def trained(params, psi) -> dict[str, jax.Array]:
    """Returns what is exported of State.params: psi's paths."""
    return {path: params[path] for path in psi}


def make_step(
    denoiser: Denoiser,
    s: Settings,
    psi: tuple[str, ...],
    tx_lower: optax.GradientTransformation,
    tx_upper: optax.GradientTransformation,
) -> Step:
    """Returns IMMA's step.

    state.params: psi's flat parameters and what the lower level trains besides (the
    rest of the UNet, or `flat_factors`); state.opt: {"lower", "upper"}, the first over
    `lower_part` of the parameters, the second over psi. frozen: {"unet": the UNet's
    other flat parameters, "abar"}. batch: {"harmful": max(inner_steps, outer_steps) * B
    pairs}; both levels see the same ones, as in the code.
    """
    scale = s.alpha / s.rank

    def unet_of(params, frozen):
        factors = _factors(params)
        unet = {**frozen["unet"], **unet_part(params)}
        return unflatten_dict(lora.apply(unet, factors, scale), sep="/")

    def lower_loss(part, fixed, batch, key):
        unet = unet_of({**fixed["rest"], **part}, fixed)
        loss = jnp.mean(denoiser.losses(unet, fixed["abar"], batch, key)[0])
        return loss, {"lower/malicious_loss": loss}

    def upper_loss(part, fixed, batch, key):
        unet = unet_of({**fixed["rest"], **part}, fixed)
        loss_B, _ = denoiser.losses(unet, fixed["abar"], batch, key)
        total = objectives.bounded_ascent(loss_B, s.bound, s.cap)
        metrics = {"upper/loss": total, "upper/malicious_loss": jnp.mean(loss_B)}
        if s.concepts:
            metrics |= objectives.losses_by_concept(
                loss_B, batch["concept"], s.concepts
            )
        return total, metrics

    def level(name, loss, tx, steps):
        return gift.make_levels(gift.make_level(name, loss, tx, s.accumulate), steps)

    lower = level("lower", lower_loss, tx_lower, s.inner_steps)
    upper = level("upper", upper_loss, tx_upper, s.outer_steps)

    def imma_step(state, frozen, batch, key):
        keys = jax.random.split(jax.random.fold_in(key, state.step))
        params, opt, metrics = dict(state.params), dict(state.opt), {}
        for name, run, names, k in (
            ("lower", lower, lower_part(params), keys[0]),
            ("upper", upper, psi, keys[1]),
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
