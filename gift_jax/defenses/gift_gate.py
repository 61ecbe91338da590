# SPDX-License-Identifier: Apache-2.0
"""A gate against a concept's images: ours, not the published method.

GIFT's two levels (see gift.py), of other parameters and one after the other:

    upper  a small detector inside the network learns to tell noised latents of the
           concept from safe ones; where it fires, it closes the network's output, in
           weights that fine-tuning does not move far (models/sd/gate.py, mmdit/gate.py)
    lower  every other parameter learns what the original predicts on safe pairs

Nothing in it depends on a word: it holds under whatever name an attacker gives to what
he teaches, and against those who change the text side alone. What the detector was not
shown it does not see: let the model draw the concept in every way that it can
(`harmful.num_drawn`).

That large weights before a normalization resist updates is known of scale-invariant
layers (arXiv:1706.05350); SpecDef (arXiv:2602.18868) slows all of a network down so.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from gift_jax.defenses import base
from gift_jax.diffusion import Denoiser
from gift_jax.runtime import config
from gift_jax.state import Loss, Step, make_descent, merge_params
from gift_jax.training.optimizer import make_optimizer

Flat = dict[str, jax.Array]
# (the detector's parameters, noised latents "B C H W") -> logits, float32 "B"
Logits = Callable[[Flat, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class GiftGate:
    """The fields of the gate."""

    share: float = config.number(
        0.125,
        above=0,
        high=0.5,
        doc="of the channels at the latents' size, or of a transformer's heads",
    )
    time_limit: float = config.number(
        0.5, above=0, high=1, doc="share of the timesteps, from 0, to detect images at"
    )
    safe_weight: float = config.number(
        10.0, above=0, doc="of a safe image taken for harmful, against the reverse"
    )
    harmful_logit: float = config.number(
        12.0, low=0, doc="that harmful images are to exceed"
    )
    safe_logit: float = config.number(
        -4.0, high=0, doc="that safe images are to stay below"
    )
    threshold: float = config.number(
        12.0, low=-20, high=50, doc="logit from which on the gate closes"
    )
    preserve_steps: int = config.number(
        250, low=0, doc="of the lower level, after config.steps of the upper one"
    )


def make_upper_loss(denoiser: Denoiser, logits: Logits, s: GiftGate) -> Loss:
    """Returns the detector's loss, the logistic one with margins.

    batch: {"harmful", "safe"}: pairs. Safe ones are noised at every timestep, harmful
    ones up to `time_limit`: above it nothing can be told.
    """

    def upper_loss(params, frozen, batch, key):
        out = {}
        for k, name, limit in zip(
            jax.random.split(key),
            ("harmful", "safe"),
            (s.time_limit, 1.0),
            strict=True,
        ):
            z, t, eps = denoiser.sample(batch[name], k, limit)
            out[name] = logits(params, denoiser.noise.noised(z, eps, t))
        missed = jnp.mean(jax.nn.softplus(s.harmful_logit - out["harmful"]))
        false = jnp.mean(jax.nn.softplus(out["safe"] - s.safe_logit))
        loss = missed + s.safe_weight * false
        return loss, {
            "upper/loss": loss,
            "upper/harmful_detected": jnp.mean(out["harmful"] > s.threshold),
            "upper/safe_detected": jnp.mean(out["safe"] > s.threshold),
        }

    return upper_loss


def make_lower_loss(denoiser: Denoiser, closed_distance: float) -> Loss:
    """Returns the distance to what the original predicts on safe pairs.

    Pairs at which the gate closes count as 0: they could teach the rest nothing.

    closed_distance: the mean square from which on an output is a closed gate's.

    frozen: "network": parameters that are not trained; "original": the others as they
    were. batch: {"safe": pairs}.
    """

    def lower_loss(params, frozen, batch, key):
        network = merge_params(params, frozen["network"])
        original = merge_params(frozen["original"], frozen["network"])
        distance_B = denoiser.distances(network, original, batch["safe"], key)
        is_open_B = distance_B < closed_distance
        loss = jnp.mean(jnp.where(is_open_B, distance_B, 0.0))
        return loss, {"lower/loss": loss, "lower/safe_closed": jnp.mean(~is_open_B)}

    return lower_loss


def make_preserve_step(lower_loss: Loss, tx, micro_batches: int = 1) -> Step:
    """Returns the step of the lower level, which leaves the gate as it is.

    frozen: {"owned": path -> bool, see `install` of the gate}, and what the loss reads.
    micro_batches: see `state.accumulate_gradients`.
    """
    descend = make_descent("lower", lower_loss, tx, micro_batches)

    def preserve_step(state, frozen, batch, key):
        new, metrics = descend(state, frozen, batch, key)
        gate = {
            path: jnp.where(is_owned, state.params[path], new.params[path])
            for path, is_owned in frozen["owned"].items()
        }
        return new.replace(params={**new.params, **gate}), metrics

    return preserve_step


def plan(task: base.Task) -> base.Plan:
    """Returns the plan: the detector, then the network around it.

    Raises: UserError for a model that can have no gate.
    """
    s, model = task.settings, task.model
    parts = task.run.hardware.grad_accum_steps
    gate = model.gate(s.share)
    tx = task.optimizer("upper")
    params = gate.init(task.key("init"))
    flat = flatten_dict(model.denoiser_params, sep="/")
    upper_loss = make_upper_loss(model.denoiser, gate.logits, s)

    def then(trained: Flat) -> base.Plan:
        network = model.float32_params(model.denoiser_component, flat)
        network, owned = gate.install(trained, network, s.threshold)
        lower_loss = make_lower_loss(model.denoiser, gate.closed_distance)
        tx_lower = make_optimizer(task.run.optimizers["lower"], s.preserve_steps)
        return base.Plan(
            step=make_preserve_step(lower_loss, tx_lower, parts),
            params=network,
            frozen={"network": {}, "original": dict(flat), "owned": owned},
            opt={"lower": tx_lower.init(network)},
            sizes={"safe": task.batch_size("safe")},
            exported=tuple(network),
            name="preserve",
            steps=s.preserve_steps,
        )

    return base.Plan(
        step=make_descent("upper", upper_loss, tx, parts),
        params=params,
        frozen={"network": flat},
        opt={"upper": tx.init(params)},
        sizes={name: task.batch_size(name) for name in ("harmful", "safe")},
        exported=tuple(params),
        then=then,
        name="detect",
    )


def _steps(run) -> str:
    return (
        f"{run.steps} of the detector, then {run.settings.preserve_steps} of the rest"
    )


DEFENSE = base.Defense(
    config=GiftGate,
    title="GIFT with a gate on the concept's images (after arXiv:2507.13598)",
    plan=plan,
    check=lambda settings, model: model.gate(settings.share) and None,
    steps=_steps,
    trainable=("all",),
    worst_case="100% after an attack that first removes unusually large weights; "
    "without that 38% at the end, of a category of things, 33% of single ones; "
    "on the way, after 75 steps, 52% of one; in a transformer 62% of one, with a LoRA "
    "made for the original",
)
