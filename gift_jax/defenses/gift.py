# SPDX-License-Identifier: Apache-2.0
"""GIFT: bi-level immunization (arXiv:2507.13598).

    upper(psi) = bounded ascent of L(psi; D_m) + beta * L_noise(psi; D_m)    degrade
    lower(psi) = L(psi; D_s)                                                 preserve

One outer step takes `inner_steps` updates of the lower level, then `outer_steps` of the
upper level, each level with its own optimiser. The upper gradient is taken

    first_order  at the parameters that the lower level reached (the published way);
    unrolled     through the lower updates: the exact hypergradient;
    joint        not in turn: one gradient of upper + joint_weight * lower.

The publication does not state its constants; every default here is ours. With an
`adversary` the upper level is taken at the parameters that a simulated attack reaches,
and the lower level has a term for what the same attack reaches on safe data.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict

from gift_jax.defenses import adversary, objectives
from gift_jax.diffusion import Denoiser
from gift_jax.models.trainable import merge_params
from gift_jax.state import State, Step, accumulate_gradients, global_norm, split_batch

GRADIENTS = ("first_order", "unrolled", "joint")
PRESERVE = ("data", "model")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The choices of GIFT; see DESIGN of each in docs/method.md.

    Attributes: gradient: of GRADIENTS. inner_steps, outer_steps: updates of the lower
      and the upper level in one outer step. beta: weight of representation noising.
      bound, cap: of the ascent, see `losses.bounded_ascent`. noise_target, distance:
      see `losses.representation_noising`. layers: kinds of layers to noise, see
      `hooks.CAPTURE_KINDS`. joint_weight: lambda of `joint`. preserve: of PRESERVE: the
      safe pairs, or what the model predicted for them. safe_limit: of the lower loss,
      see `granted`; 0 for none. attack: the adversary's.
      accumulate: parts of a level's batch, see `losses.in_parts`; first_order only.
      concepts: names of the malicious ones, to log the loss of each of several.
    """

    gradient: str = "first_order"
    inner_steps: int = 1
    outer_steps: int = 1
    beta: float = 1e-3
    bound: str = "hinge"
    cap: float = 1.0
    noise_target: str = "standard"
    distance: str = "mse"
    layers: tuple[str, ...] = ("transformer",)
    joint_weight: float = 1.0
    preserve: str = "data"
    safe_limit: float = 0.0
    attack: adversary.Settings = adversary.Settings()
    accumulate: int = 1
    concepts: tuple[str, ...] = ()


# (trainable flat parameters, frozen, batch, key) -> (scalar to minimise, metrics)
Loss = Callable[[Any, Any, dict, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def make_lower_loss(denoiser: Denoiser, s: Settings = Settings()) -> Loss:  # noqa: B008
    """Returns L(psi; D_s), the diffusion loss of a batch of safe pairs.

    With preserve=model, the distance of what is predicted for them to what
    frozen["original"], the trainable parameters as they were, predicts.
    With an adversary of safe_weight w, plus w L(attack(psi; D_s); D_s): what is safe
    must stay learnable.
    """
    weight = s.attack.safe_weight if s.attack.kinds else 0.0
    simulate = adversary.make_simulate(denoiser, s.attack) if weight else None

    def lower_loss(params, frozen, batch, key):
        unet = merge_params(params, frozen["unet"])
        if s.preserve == "model":
            was = merge_params(frozen["original"], frozen["unet"])
            loss_B = denoiser.distances(unet, was, frozen["abar"], batch, key)
        else:
            loss_B, _ = denoiser.losses(unet, frozen["abar"], batch, key)
        loss = jnp.mean(loss_B)
        metrics = {"lower/loss": loss}
        if simulate is None:
            return loss, metrics
        k_attack, k_after = jax.random.split(jax.random.fold_in(key, 1))
        flat = {**frozen["unet"], **params}
        after = simulate(flat, frozen["abar"], batch, k_attack)
        after = unflatten_dict(after, sep="/")
        learned = jnp.mean(denoiser.losses(after, frozen["abar"], batch, k_after)[0])
        return loss + weight * learned, metrics | {"lower/learned_loss": learned}

    return lower_loss


def make_upper_loss(denoiser: Denoiser, s: Settings) -> Loss:
    """Returns the upper level's objective on malicious pairs, to minimise.

    With an adversary, at the parameters that fine-tuning on the same pairs reaches;
    with a horizon, at those that frozen["shift"] leads to.
    """
    capture = s.layers if s.beta else ()
    simulate = None
    if s.attack.kinds and not s.attack.horizon:
        simulate = adversary.make_simulate(denoiser, s.attack)

    def upper_loss(params, frozen, batch, key):
        k_loss, k_noise = jax.random.split(key)
        if s.attack.kinds and s.attack.horizon:
            flat = {**frozen["unet"], **params}
            attacked = adversary.apply_delta(flat, frozen["shift"])
            unet = unflatten_dict(attacked, sep="/")
        elif simulate is None:
            unet = merge_params(params, frozen["unet"])
        else:
            k_attack = jax.random.fold_in(key, 1)
            flat = {**frozen["unet"], **params}
            attacked = simulate(flat, frozen["abar"], batch, k_attack)
            unet = unflatten_dict(attacked, sep="/")
        loss_B, hiddens = denoiser.losses(unet, frozen["abar"], batch, k_loss, capture)
        total = objectives.bounded_ascent(loss_B, s.bound, s.cap)
        metrics = {"upper/malicious_loss": jnp.mean(loss_B)}
        if s.concepts:
            metrics |= objectives.losses_by_concept(
                loss_B, batch["concept"], s.concepts
            )
        if s.beta:
            noising = objectives.representation_noising(
                k_noise,
                hiddens,
                s.noise_target,
                s.distance,
                index_B=batch.get("index"),
            )
            total += s.beta * noising
            metrics["upper/noising"] = noising
        return total, {"upper/loss": total, **metrics}

    return upper_loss


def gradient(loss: Loss) -> Callable:
    """Returns `jax.grad(loss, has_aux=True)`, cheaper to differentiate in its turn.

    Its derivative is the loss's Hessian times a vector, taken forward over reverse: the
    memory of about two gradients, where reverse over reverse takes more. Metrics count
    as constants.
    """
    plain = jax.grad(loss, has_aux=True)

    def forward(*args):
        return plain(*args), args

    def backward(args, cotangents):
        params, *rest = args
        (vector, _) = cotangents
        _, product = jax.jvp(lambda p: plain(p, *rest)[0], (params,), (vector,))
        return product, None, None, None

    grad_fn = jax.custom_vjp(plain)
    grad_fn.defvjp(forward, backward)
    return grad_fn


def make_level(
    name: str, loss: Loss, tx: optax.GradientTransformation, parts: int = 1
) -> Callable:
    """Returns one update of one level: (params, opt, frozen, batch, key) -> the same.

    Returns (params, opt state, metrics); differentiable, so that the upper level can be
    taken through it. parts: see `losses.in_parts`.
    """
    grad_fn = accumulate_gradients(gradient(loss), parts)

    def update(params, opt, frozen, batch, key):
        grads, metrics = grad_fn(params, frozen, batch, key)
        updates, opt = tx.update(grads, opt, params)
        metrics = metrics | {f"{name}/grad_norm": global_norm(grads)}
        return optax.apply_updates(params, updates), opt, metrics

    return update


def make_levels(update: Callable, steps: int) -> Callable:
    """Returns `steps` updates of one level in one scan, each on its part of the batch.

    The batch's leading axis is steps * B, see `losses.split`; metrics are those of the
    last update. With 0 steps nothing changes and no metric is reported.
    """

    def updates(params, opt, frozen, batch, key):
        if steps == 0:
            return params, opt, {}

        def body(carry, part):
            params, opt, metrics = update(*carry, frozen, *part)
            return (params, opt), metrics

        parts = split_batch(batch, steps)
        # One update uses the key itself, as the unrolled and the joint gradient do.
        keys = jax.random.split(key, steps) if steps > 1 else key[None]
        if steps == 1:  # no loop: faster on CPU, and easier to read in a profile
            first = jax.tree.map(lambda a: a[0], (parts, keys))
            (params, opt), metrics = body((params, opt), first)
            return params, opt, metrics
        carry, metrics = jax.lax.scan(
            jax.checkpoint(body), (params, opt), (parts, keys)
        )
        return *carry, jax.tree.map(lambda m: m[-1], metrics)

    return updates


def make_step(
    denoiser: Denoiser,
    s: Settings,
    tx_lower: optax.GradientTransformation,
    tx_upper: optax.GradientTransformation,
) -> Step:
    """Returns GIFT's outer step.

    state.params: trainable flat parameters; state.opt: {"lower", "upper"}, and with an
    adversary's horizon "attacker", see `adversary.start`. frozen:
    {"unet": frozen flat parameters, "abar": float32 "T"}. batch: {"safe": inner_steps *
    B pairs, "harmful": outer_steps * B pairs}, see `Denoiser.losses`. The keys of the
    two levels are independent and depend on the base key and state.step only.
    """
    lower_loss = make_lower_loss(denoiser, s)
    upper_loss = make_upper_loss(denoiser, s)
    if s.gradient == "joint":
        return _joint_step(lower_loss, upper_loss, s, tx_upper)
    lower = make_levels(
        make_level("lower", lower_loss, tx_lower, s.accumulate), s.inner_steps
    )
    if s.gradient == "unrolled":
        return _unrolled_step(lower, upper_loss, tx_upper)
    upper = make_levels(
        make_level("upper", upper_loss, tx_upper, s.accumulate), s.outer_steps
    )
    pursued = bool(s.attack.kinds and s.attack.horizon)
    pursue = adversary.make_continue_attack(denoiser, s.attack)

    def gift_step(state, frozen, batch, key):
        k_lower, k_upper = _keys(key, state)
        params, opt_lower, m_lower = lower(
            state.params, state.opt["lower"], frozen, batch["safe"], k_lower
        )
        others = {}
        if pursued:
            attacker, k_attack = state.opt["attacker"], jax.random.fold_in(k_upper, 1)
            flat = {**frozen["unet"], **params}
            attacker = pursue(
                attacker, flat, frozen["abar"], batch["harmful"], k_attack
            )
            frozen = {**frozen, "shift": attacker["shift"]}
            others["attacker"] = attacker
        moved, opt_upper, m_upper = upper(
            params, state.opt["upper"], frozen, batch["harmful"], k_upper
        )
        if s.safe_limit:
            share = update_scale(m_lower["lower/loss"], s.safe_limit)
            moved = jax.tree.map(lambda p, q: p + share * (q - p), params, moved)
            m_upper["upper/granted"] = share
        new = _next(state, moved, opt_lower, opt_upper)
        return new.replace(opt=new.opt | others), m_lower | m_upper

    return gift_step


def update_scale(lower_loss: jax.Array, limit: float) -> jax.Array:
    """Returns the share of the upper level's movement that the lower one still allows.

    1 up to the limit, none from twice the limit on, linear between: past a point the
    lower level cannot mend any more what the upper one breaks.
    """
    return jnp.clip(2.0 - lower_loss / limit, 0.0, 1.0)


def hypergradient(lower: Callable, upper_loss: Loss) -> Callable:
    """Returns the gradient of upper(psi*(psi)) with respect to psi, and psi* itself.

    psi* is what the lower level's updates make of psi; the gradient goes through all of
    them, the optimiser's own arithmetic included.

    Returns: (params, opt_lower, frozen, batch, keys) -> (grads, (psi*, the lower
    level's new optimiser state, metrics)).
    """

    def upper_after_lower(params, opt_lower, frozen, batch, k_lower, k_upper):
        reached, opt_lower, m_lower = lower(
            params, opt_lower, frozen, batch["safe"], k_lower
        )
        loss, m_upper = upper_loss(reached, frozen, batch["harmful"], k_upper)
        return loss, (reached, opt_lower, m_lower | m_upper)

    return jax.grad(upper_after_lower, has_aux=True)


def _unrolled_step(lower, upper_loss, tx_upper) -> Step:
    grad_fn = hypergradient(lower, upper_loss)

    def unrolled_step(state, frozen, batch, key):
        keys = _keys(key, state)
        grads, (params, opt_lower, metrics) = grad_fn(
            state.params, state.opt["lower"], frozen, batch, *keys
        )
        updates, opt_upper = tx_upper.update(grads, state.opt["upper"], params)
        params = optax.apply_updates(params, updates)
        metrics = metrics | {"upper/grad_norm": global_norm(grads)}
        return _next(state, params, opt_lower, opt_upper), metrics

    return unrolled_step


def _joint_step(lower_loss, upper_loss, s: Settings, tx) -> Step:
    def joint_loss(params, frozen, batch, keys):
        lower, m_lower = lower_loss(params, frozen, batch["safe"], keys[0])
        upper, m_upper = upper_loss(params, frozen, batch["harmful"], keys[1])
        return upper + s.joint_weight * lower, m_lower | m_upper

    def joint_step(state, frozen, batch, key):
        grads, metrics = jax.grad(joint_loss, has_aux=True)(
            state.params, frozen, batch, _keys(key, state)
        )
        updates, opt = tx.update(grads, state.opt["upper"], state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = metrics | {"upper/grad_norm": global_norm(grads)}
        return _next(state, params, state.opt["lower"], opt), metrics

    return joint_step


def _keys(base_key, state: State):
    return jax.random.split(jax.random.fold_in(base_key, state.step))


def _next(state: State, params, opt_lower, opt_upper) -> State:
    opt = {"lower": opt_lower, "upper": opt_upper}
    return state.replace(step=state.step + 1, params=params, opt=opt)
