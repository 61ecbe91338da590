# SPDX-License-Identifier: Apache-2.0
"""DreamBooth as an attack: every parameter of the network trains on a few pictures.

Optionally with prior preservation (pictures of the class, drawn by the model itself,
keep the class what it was) and with the text encoder trained too.
Source: Ruiz et al. 2022, arXiv:2208.12242; losses and what trains as diffusers'
examples/dreambooth/train_dreambooth.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from gift_jax.attacks import base
from gift_jax.diffusion import Denoiser
from gift_jax.models import weights
from gift_jax.runtime import config
from gift_jax.state import Step, make_descent


@dataclasses.dataclass(frozen=True)
class DreamBooth:
    """The fields of DreamBooth."""

    prior_weight: float = config.number(
        0.0, low=0, doc="of the loss on the group `prior`; 0: not read"
    )
    train_text_encoder: bool = config.value(False, "the text encoder trains too")
    outlier_limit: float = config.number(
        0.0, low=0, doc="weights over so many medians of their tensor become 0; 0: none"
    )


# ({component: nested parameters of a text encoder}, int32 "B L" ids) -> cond
EncodeIds = Callable[[dict, jax.Array], Any]


def make_step(
    denoiser: Denoiser,
    tx: optax.GradientTransformation,
    prior_weight: float = 0.0,
    encode_ids: EncodeIds | None = None,
    micro_batches: int = 1,
) -> Step:
    """Returns the attack's step.

    The loss is mean over the instance pairs + prior_weight * mean over the prior pairs.

    state.params: every parameter of the network, flat, float32; with `encode_ids` the
    text encoder's too. state.opt: {"attack"}. frozen: what lies with the network's
    parameters and is none in PyTorch, flat; of a UNet {}. batch: {"data": pairs, and
    with a prior_weight "prior": pairs}; with `encode_ids`, pairs hold ids, int32 "B L",
    in place of cond, or cond of images alone. micro_batches: see
    `state.accumulate_gradients`.
    """

    def loss_of(params, frozen, pairs, key):
        flat, text = weights.network_and_text({**frozen, **params})
        if encode_ids is not None:
            nested = {name: unflatten_dict(text[name], sep="/") for name in text}
            pairs = with_encoded_ids(encode_ids, nested, pairs)
        network = unflatten_dict(flat, sep="/")
        return jnp.mean(denoiser.losses(network, pairs, key)[0])

    def loss_fn(params, frozen, batch, key):
        k_instance, k_prior = jax.random.split(key)
        loss = loss_of(params, frozen, batch["data"], k_instance)
        if not prior_weight:
            return loss, {"attack/loss": loss}
        prior = loss_of(params, frozen, batch["prior"], k_prior)
        total = loss + prior_weight * prior
        parts = {"attack/instance_loss": loss, "attack/prior_loss": prior}
        return total, {"attack/loss": total, **parts}

    return make_descent("attack", loss_fn, tx, micro_batches)


def with_encoded_ids(encode_ids: EncodeIds, text: dict, pairs: dict) -> dict:
    """Returns pairs with the conditioning of their ids, beside what images have."""
    cond = {**pairs.get("cond", {}), **encode_ids(text, pairs["ids"])}
    return {**pairs, "cond": cond}


def without_outliers(params: base.Flat, limit: float) -> base.Flat:
    """Returns the parameters, with 0 for those that are too large for their tensor.

    What an attacker tries who suspects a defense in large weights: ours, as no
    published attack does it.

    Args: limit: times the median of the tensor's magnitudes, zeros left out.
    """

    def remove(a):
        size = jnp.abs(a)
        median = jnp.nanmedian(jnp.where(size > 0, size, jnp.nan))
        return jnp.where(size > limit * median, 0.0, a)

    return jax.tree.map(remove, params)


def plan(task: base.Task) -> base.Plan:
    """Returns the plan of DreamBooth.

    Its params may be the model's own arrays, which the loop donates: what is drawn
    afterwards is drawn with the trained ones.
    """
    s, model = task.settings, task.model
    params, flat = {}, flatten_dict(model.denoiser_params, sep="/")
    paths = {model.denoiser_component: model.trainable_paths("all")}
    for component in model.text_components if s.train_text_encoder else ():
        paths[component] = tuple(flatten_dict(model.params[component], sep="/"))
    for component, names in paths.items():
        for path, array in model.float32_params(component, names).items():
            params[weights.joined_path(component, path)] = array
    frozen = {path: flat[path] for path in flat if path not in params}
    if s.outlier_limit:
        params = without_outliers(params, s.outlier_limit)
    step = make_step(
        model.denoiser,
        task.tx,
        s.prior_weight,
        model.encode_ids if s.train_text_encoder else None,
        task.micro_batches,
    )
    return base.Plan(model, step, params, frozen, reads_ids=s.train_text_encoder)


ATTACK = base.Attack(
    config=DreamBooth,
    title="DreamBooth (arXiv:2208.12242)",
    plan=plan,
    changed=lambda s, folder, params: dict(params),
    groups=("data", "prior"),
    reads=lambda s: ("data", "prior") if s.prior_weight else ("data",),
    trained=lambda s: (
        "the {denoiser} and the text encoder"
        if s.train_text_encoder
        else "the whole {denoiser}"
    ),
)
