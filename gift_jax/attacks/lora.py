# SPDX-License-Identifier: Apache-2.0
"""LoRA fine-tuning as an attack: W + (alpha / rank) A B on attention projections.

Applied in parameter space, so that any UNet can be attacked without touching its code.
Source: Hu et al. 2021, arXiv:2106.09685; targets and initialisation as diffusers'
examples/text_to_image/train_text_to_image_lora.py.
"""

import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict

from gift_jax import losses
from gift_jax.config import UserError
from gift_jax.loop import Step
from gift_jax.methods.denoise import Denoiser

TARGETS = ("to_q", "to_k", "to_v", "to_out_0")
Factors = dict[str, dict[str, jax.Array]]


def init(
    key: jax.Array,
    unet_params: Mapping[str, jax.Array],
    rank: int,
    targets: Sequence[str] = TARGETS,
) -> Factors:
    """Returns the factors at their start: A ~ N(0, 1 / rank), B = 0, float32.

    Args: unet_params: flat, path -> array. targets: names of projections in attn1 and
      attn2.
    Returns: kernel path -> {"A": "I R", "B": "R O"} for a kernel "I O".
    Raises: UserError for rank < 1 or a target that no kernel has.
    """
    if rank < 1:
        raise UserError(f"config.lora.rank={rank} must be at least 1; try 4")
    for target in targets or ("",):
        pattern = re.compile(rf"/attn[12]/{re.escape(target)}/kernel$")
        if not any(pattern.search(path) for path in unet_params):
            names = ", ".join(TARGETS)
            raise UserError(
                f"config.lora.targets: no attention projection is called {target!r}; "
                f"choose from {names}"
            )
    pattern = re.compile(rf"/attn[12]/({'|'.join(targets)})/kernel$")
    paths = sorted(path for path in unet_params if pattern.search(path))
    factors = {}
    for k, path in zip(jax.random.split(key, len(paths)), paths, strict=True):
        wide, out = unet_params[path].shape
        A_IR = jax.random.normal(k, (wide, rank), jnp.float32) / rank
        factors[path] = {"A": A_IR, "B": jnp.zeros((rank, out), jnp.float32)}
    return factors


def apply(
    unet_params: Mapping[str, jax.Array], factors: Factors, scale: float | jax.Array
) -> dict[str, jax.Array]:
    """Returns the flat parameters with W + scale A B in place of each kernel W."""
    changed = {}
    for path, f in factors.items():
        W_IO = unet_params[path]
        delta_IO = scale * (f["A"] @ f["B"])
        changed[path] = W_IO + delta_IO.astype(W_IO.dtype)
    return {**unet_params, **changed}


def make_step(
    denoiser: Denoiser, tx: optax.GradientTransformation, scale: float
) -> Step:
    """Returns the attack's step: the ordinary diffusion loss, trained through A and B.

    state.params: the factors; state.opt: {"attack"}. frozen: {"unet": every parameter,
    flat; "abar": float32 "T"}. batch: {"attack": pairs}.
    """

    def loss_fn(factors, frozen, batch, key):
        unet = unflatten_dict(apply(frozen["unet"], factors, scale), sep="/")
        return jnp.mean(denoiser.losses(unet, frozen["abar"], batch, key)[0])

    def lora_step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        loss, grads = jax.value_and_grad(loss_fn)(
            state.params, frozen, batch["attack"], key
        )
        updates, opt = tx.update(grads, state.opt["attack"], state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"attack/loss": loss, "attack/grad_norm": losses.global_norm(grads)}
        state = state.replace(step=state.step + 1, params=params, opt={"attack": opt})
        return state, metrics

    return lora_step
