# SPDX-License-Identifier: Apache-2.0
"""DreamBooth as an attack: every parameter of the UNet trains on a few pictures.

Optionally with prior preservation (pictures of the class, drawn by the model itself,
keep the class what it was) and with the text encoder trained too.
Source: Ruiz et al. 2022, arXiv:2208.12242; losses and what trains as diffusers'
examples/dreambooth/train_dreambooth.py.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict

from gift_jax.attacks import descent
from gift_jax.diffusion import Denoiser
from gift_jax.models import weights
from gift_jax.state import Step

# (nested parameters of the text encoder, int32 "B L" ids) -> float32 "B L D"
Encode = Callable[[dict, jax.Array], jax.Array]


def make_step(
    denoiser: Denoiser,
    tx: optax.GradientTransformation,
    prior_weight: float = 0.0,
    encode: Encode | None = None,
    parts: int = 1,
) -> Step:
    """Returns the attack's step.

    The loss is mean over the instance pairs + prior_weight * mean over the prior pairs.

    state.params: every parameter of the UNet, flat, float32; with `encode` the text
    encoder's too. state.opt: {"attack"}. frozen: {"abar": float32 "T"}.
    batch: {"attack": pairs, and with a prior_weight "prior": pairs}; with `encode`,
    pairs hold ids, int32 "B L", in place of text. parts: see `losses.in_parts`.
    """

    def loss_of(params, abar, pairs, key):
        parts = weights.by_component(params)
        if encode is not None:
            text = unflatten_dict(parts["text_encoder"], sep="/")
            pairs = {**pairs, "text": encode(text, pairs["ids"])}
        unet = unflatten_dict(parts["unet"], sep="/")
        return jnp.mean(denoiser.losses(unet, abar, pairs, key)[0])

    def loss_fn(params, frozen, batch, key):
        k_instance, k_prior = jax.random.split(key)
        loss = loss_of(params, frozen["abar"], batch["attack"], k_instance)
        if not prior_weight:
            return loss, {}
        prior = loss_of(params, frozen["abar"], batch["prior"], k_prior)
        others = {"attack/instance_loss": loss, "attack/prior_loss": prior}
        return loss + prior_weight * prior, others

    return descent.make_step(loss_fn, tx, parts)
