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
import numpy as np
import optax
from flax.traverse_util import unflatten_dict

from gift_jax.attacks import descent
from gift_jax.diffusion import Denoiser
from gift_jax.models import safetensors_io
from gift_jax.runtime.errors import UserError, shown
from gift_jax.state import Step

TARGETS = ("to_q", "to_k", "to_v", "to_out_0")
Factors = dict[str, dict[str, jax.Array]]


def check(rank: int, targets: Sequence[str]) -> None:
    """Raises UserError for rank < 1, or a target that is not one of `TARGETS`."""
    if rank < 1:
        raise UserError(f"config.lora.rank={rank} must be at least 1; try 4")
    for target in targets or ("",):
        if target not in TARGETS:
            raise UserError(
                f"config.lora.targets: no attention projection is called "
                f"{shown(target)}; "
                f"choose from {', '.join(TARGETS)}"
            )


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
    Raises: UserError as `check` does.
    """
    check(rank, targets)
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
    denoiser: Denoiser,
    tx: optax.GradientTransformation,
    scale: float,
    parts: int = 1,
) -> Step:
    """Returns the attack's step: the ordinary diffusion loss, trained through A and B.

    state.params: the factors; state.opt: {"attack"}. frozen: {"unet": every parameter,
    flat; "abar": float32 "T"}. batch: {"attack": pairs}. parts: see
    `losses.in_parts`.
    """

    def loss_fn(factors, frozen, batch, key):
        unet = unflatten_dict(apply(frozen["unet"], factors, scale), sep="/")
        pairs = batch["attack"]
        return jnp.mean(denoiser.losses(unet, frozen["abar"], pairs, key)[0]), {}

    return descent.make_step(loss_fn, tx, parts)


def torch_state(factors: Factors, scale: float) -> dict[str, np.ndarray]:
    """Returns the factors as diffusers' `load_lora_weights` reads them, float32.

    For a kernel "unet.X.to_k": X.to_k.lora.down.weight "R I" and .lora.up.weight "O R".
    `scale`, alpha / rank, is multiplied into up: diffusers reads no alpha beside these
    names, and takes it for the rank.
    Source: diffusers `StableDiffusionLoraLoaderMixin.save_lora_weights`.
    """
    state = {}
    for path, f in factors.items():
        name = f"unet.{safetensors_io.torch_name(path).removesuffix('.weight')}.lora"
        down_RI = np.asarray(f["A"], np.float32).T
        up_OR = (np.float32(scale) * np.asarray(f["B"], np.float32)).T
        state[f"{name}.down.weight"] = np.ascontiguousarray(down_RI)
        state[f"{name}.up.weight"] = np.ascontiguousarray(up_OR)
    return state
