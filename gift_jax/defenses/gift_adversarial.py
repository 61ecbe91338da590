# SPDX-License-Identifier: Apache-2.0
"""GIFT with an attacker beside the training: ours, not the published method.

The published levels (see gift.py), with three changes:

  * the upper level is taken at the parameters that an attacker has reached, who
    fine-tunes the whole network on the harmful pairs beside the training and starts
    anew every `restart_every` steps on average;
  * the lower level asks for what the original model predicts on safe pairs, a target
    without noise, in place of the data (`lower_target`);
  * the upper update fades where the lower loss is above `lower_loss_limit`.

Afterwards the model is fine-tuned on safe pairs. ResAlign (arXiv:2507.16302) and APDM
(arXiv:2511.01307) look past the released weights in this way too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict

from gift_jax.defenses import base, gift
from gift_jax.diffusion import Denoiser
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError
from gift_jax.state import (
    Loss,
    Step,
    Update,
    make_descent,
    make_update,
    merge_params,
    repeat_update,
)
from gift_jax.training.optimizer import Optimizer, make_optimizer

LOWER_TARGETS = ("data", "model")
Flat = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Attacker:
    """The fields of the attacker in the loop; each range is drawn from every step."""

    restart_every: int = config.number(
        30, low=1, doc="steps after which an attack starts anew, on average"
    )
    steps_min: int = config.number(1, low=0, doc="Adam updates a step, at least")
    steps_max: int = config.number(1, low=1, doc="Adam updates a step, at most")
    lr_min: float = config.number(1e-4, low=1e-12, doc="Adam's rate, log-uniform, from")
    lr_max: float = config.number(3e-4, low=1e-12, doc="Adam's rate, log-uniform, to")

    def check(self, field: str) -> None:
        for name in ("steps", "lr"):
            low, high = getattr(self, f"{name}_min"), getattr(self, f"{name}_max")
            if low > high:
                raise UserError(
                    f"{field}.{name}_min={low} must be at most {name}_max={high}"
                )


@dataclasses.dataclass(frozen=True)
class PostFinetune(Optimizer):
    """The fields of fine-tuning on safe pairs, after the immunization."""

    steps: int = config.number(0, low=0, doc="updates on safe pairs; 0: none")


@dataclasses.dataclass(frozen=True)
class GiftAdversarial(gift.Gift):
    """GIFT's fields and the additional ones."""

    lower_target: str = config.choice(
        "model", LOWER_TARGETS, "of the lower level: the data, or the original model"
    )
    lower_loss_limit: float = config.number(
        0.0, low=0, doc="lower loss above which the upper update fades; 0: none"
    )
    attacker: Attacker = config.group(Attacker)
    post_finetune: PostFinetune = config.group(PostFinetune)

    def check(self, field: str) -> None:
        super().check(field)
        if self.gradient != "first_order":
            raise UserError(
                f"{field}.gradient={self.gradient} must be first_order: the attacker "
                "moves between the levels; set it, or use method=gift"
            )
        if self.lower_loss_limit and not self.inner_steps:
            raise UserError(
                f"{field}.lower_loss_limit={self.lower_loss_limit} needs a lower "
                f"level; set --{field}.inner_steps=1, or the limit to 0"
            )


# --- the lower level ------------------------------------------------------------------


def make_lower_loss(denoiser: Denoiser, target: str) -> Loss:
    """Returns the loss of safe pairs for a target of LOWER_TARGETS.

    model: the distance to what frozen["original"], the trainable parameters at their
    start, predicts for them.
    """
    if target == "data":
        return gift.make_lower_loss(denoiser)

    def lower_loss(params, frozen, batch, key):
        network = merge_params(params, frozen["network"])
        original = merge_params(frozen["original"], frozen["network"])
        loss = jnp.mean(denoiser.distances(network, original, batch, key))
        return loss, {"lower/loss": loss}

    return lower_loss


def update_scale(lower_loss: jax.Array, limit: float) -> jax.Array:
    """Returns the factor in [0, 1] by which to scale the upper update.

    1 up to the limit, 0 from twice the limit on, linear between, so that the lower
    level can recover.
    """
    return jnp.clip(2.0 - lower_loss / limit, 0.0, 1.0)


# --- the attacker ---------------------------------------------------------------------


def init_attacker(attacked: Flat) -> dict[str, Any]:
    """Returns an attacker at its start: no change of any parameter, Adam's state.

    Args: attacked: the parameters that it trains.
    """
    delta = {path: jnp.zeros(a.shape, _float32(a)) for path, a in attacked.items()}
    return {"delta": delta, "opt": _adam().init(delta)}


def apply_delta(network: Flat, delta: Flat) -> Flat:
    """Returns the parameters with a change added, in their own dtypes."""
    moved = {path: network[path] for path in delta}
    moved = {path: a + delta[path].astype(a.dtype) for path, a in moved.items()}
    return {**network, **moved}


def make_continue_attack(denoiser: Denoiser, s: Attacker) -> Callable:
    """Returns an attack that goes on beside the training: some updates a call.

    (attacker, every parameter of the network, flat; batch of pairs; key) -> attacker.
    Its "delta" is how far fine-tuning has moved each parameter from where the model
    stands. A long attack costs a few updates a step, since the model moves little in
    one.
    """
    adam = _adam()

    def continue_attack(attacker, network, batch, key):
        k_new, k_lr, k_steps, k_attack = jax.random.split(key, 4)
        low, high = jnp.log(s.lr_min), jnp.log(s.lr_max)
        lr = jnp.exp(jax.random.uniform(k_lr, (), minval=low, maxval=high))
        steps = jax.random.randint(k_steps, (), s.steps_min, s.steps_max + 1)
        goes_on = jax.random.uniform(k_new) >= 1.0 / s.restart_every
        start = init_attacker({path: network[path] for path in attacker["delta"]})
        attacker = jax.tree.map(
            lambda old, new: jnp.where(goes_on, old, new), attacker, start
        )
        keys = jax.random.split(k_attack, s.steps_max)

        def loss_fn(delta, k):
            attacked = unflatten_dict(apply_delta(network, delta), sep="/")
            return jnp.mean(denoiser.losses(attacked, batch, k)[0])

        def update(i, carry):
            delta, opt = carry
            updates, opt = adam.update(jax.grad(loss_fn)(delta, keys[i]), opt)
            updates = jax.tree.map(lambda u: -lr * u, updates)
            return optax.apply_updates(delta, updates), opt

        carry = attacker["delta"], attacker["opt"]
        delta, opt = jax.lax.fori_loop(0, steps, update, carry)
        return {"delta": delta, "opt": opt}

    return continue_attack


def _float32(array):
    return jnp.promote_types(jnp.float32, array.dtype)


def _adam() -> optax.GradientTransformation:
    return optax.scale_by_adam(eps_root=1e-20)


# --- the step -------------------------------------------------------------------------


def make_upper_loss(
    denoiser: Denoiser, s: GiftAdversarial, concepts: tuple[str, ...] = ()
) -> Loss:
    """Returns GIFT's upper level, taken at what frozen["delta"] makes of the model."""

    def attacked(params, frozen):
        network = {**frozen["network"], **params}
        return unflatten_dict(apply_delta(network, frozen["delta"]), sep="/")

    return gift.make_upper_loss(denoiser, s, concepts, network_at=attacked)


def make_step(
    lower: Update, upper: Update, continue_attack: Callable, limit: float
) -> Step:
    """Returns the step: lower level, attacker, upper level.

    As `gift.make_gift_step`; state.opt has "attacker" too, see `init_attacker`, and
    frozen "original" for lower_target=model. limit: lower_loss_limit; 0: none.
    """

    def gift_adversarial_step(state, frozen, batch, key):
        k_lower, k_upper = gift.level_keys(key, state)
        params, opt_lower, m_lower = lower(
            state.params, state.opt["lower"], frozen, batch["safe"], k_lower
        )
        attacker = continue_attack(
            state.opt["attacker"],
            {**frozen["network"], **params},
            batch["harmful"],
            jax.random.fold_in(k_upper, 1),
        )
        upper_frozen = {**frozen, "delta": attacker["delta"]}
        updated, opt_upper, m_upper = upper(
            params, state.opt["upper"], upper_frozen, batch["harmful"], k_upper
        )
        if limit:
            scale = update_scale(m_lower["lower/loss"], limit)
            updated = jax.tree.map(lambda p, q: p + scale * (q - p), params, updated)
            m_upper["upper/update_scale"] = scale
        opt = {"lower": opt_lower, "upper": opt_upper, "attacker": attacker}
        return gift.next_state(state, updated, opt), m_lower | m_upper

    return gift_adversarial_step


def plan(task: base.Task) -> base.Plan:
    """Returns the plan: the immunization, then fine-tuning on safe pairs."""
    s, run = task.settings, task.run
    if run.hardware.grad_accum_steps > 1:
        raise UserError(
            f"config.hardware.grad_accum_steps={run.hardware.grad_accum_steps} is not "
            "for an attacker in the loop; set --config.hardware.grad_accum_steps=1"
        )
    denoiser, parts = task.model.denoiser, task.model.split(run.trainable)
    network = {**parts.frozen, **parts.trainable}
    tx_lower = task.optimizer("lower", s.inner_steps)
    tx_upper = task.optimizer("upper", s.outer_steps)
    lower = make_update("lower", make_lower_loss(denoiser, s.lower_target), tx_lower)
    upper = make_update("upper", make_upper_loss(denoiser, s, task.concepts), tx_upper)
    frozen = {"network": parts.frozen}
    if s.lower_target == "model":  # a copy: the loop donates the model's own
        frozen["original"] = jax.tree.map(jnp.array, parts.trainable)
    return base.Plan(
        step=make_step(
            repeat_update(lower, s.inner_steps),
            repeat_update(upper, s.outer_steps),
            make_continue_attack(denoiser, s.attacker),
            s.lower_loss_limit,
        ),
        params=parts.trainable,
        frozen=frozen,
        opt={
            "lower": tx_lower.init(parts.trainable),
            "upper": tx_upper.init(parts.trainable),
            "attacker": init_attacker(
                {path: network[path] for path in task.model.trainable_paths("all")}
            ),
        },
        sizes=gift.level_sizes(task),
        exported=tuple(parts.trainable),
        then=_post_finetune(task, frozen) if s.post_finetune.steps else None,
    )


def _post_finetune(task: base.Task, frozen) -> Callable[[Flat], base.Plan]:
    s, denoiser = task.settings, task.model.denoiser
    tx = make_optimizer(s.post_finetune, s.post_finetune.steps)
    lower_loss = make_lower_loss(denoiser, s.lower_target)

    def loss(params, frozen, batch, key):
        return lower_loss(params, frozen, batch["safe"], key)

    def then(params: Flat) -> base.Plan:
        return base.Plan(
            step=make_descent("lower", loss, tx),
            params=params,
            frozen=frozen,
            opt={"lower": tx.init(params)},
            sizes={"safe": task.batch_size("safe")},
            exported=tuple(params),
            name="post_finetune",
            steps=s.post_finetune.steps,
        )

    return then


def _steps(run) -> str:
    more = run.settings.post_finetune.steps
    return f"{run.steps}" + f", then {more} of fine-tuning on safe data" * bool(more)


DEFENSE = base.Defense(
    config=GiftAdversarial,
    title="GIFT with an attacker in the loop (after arXiv:2507.13598)",
    plan=plan,
    check=gift.check_layers,
    steps=_steps,
    worst_case="100% after DreamBooth by the concept's name, as without a defense",
)
