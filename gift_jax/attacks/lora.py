# SPDX-License-Identifier: Apache-2.0
"""LoRA fine-tuning as an attack: W + (alpha / rank) A B on projections.

Of the denoiser, and of the text encoders too if asked. Applied in parameter space, so
that any model can be attacked without touching its code.
Source: Hu et al. 2021, arXiv:2106.09685; targets and initialization as diffusers'
examples/text_to_image/train_text_to_image_lora.py, and of the text encoders as
train_text_to_image_lora_sdxl.py.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from gift_jax.attacks import base
from gift_jax.attacks.dreambooth import EncodeIds, with_encoded_ids
from gift_jax.diffusion import Denoiser
from gift_jax.models import safetensors_io, weights
from gift_jax.models.sd import kohya, lora_files
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError
from gift_jax.state import Step, make_descent

_OF_IMAGES = ("to_q", "to_k", "to_v", "to_out_0")  # of a UNet all
TARGETS = (*_OF_IMAGES, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TARGETS += ("net_0/proj", "net_2")  # of feed-forwards
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
_TEXT_KERNELS = rf"/self_attn/({'|'.join(TEXT_TARGETS)})/kernel$"
DIFFUSERS_FILE = "lora/pytorch_lora_weights.safetensors"  # in a run's folder
KOHYA_FILE = "lora/kohya.safetensors"
Factors = dict[str, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Lora:
    """The fields of LoRA."""

    rank: int = config.number(4, low=1, doc="of the update of each projection")
    alpha: float = config.number(
        4.0, above=0, doc="the update is scaled by alpha / rank"
    )
    targets: tuple[str, ...] = config.choice(
        _OF_IMAGES,
        TARGETS,
        "projections that get an update, of those that the model has",
    )
    train_text_encoder: bool = config.value(
        False, "the text encoders' projections get one, too"
    )

    def check(self, field: str) -> None:
        if not self.targets:
            raise UserError(
                f"{field}.targets is empty; choose from {', '.join(TARGETS)}"
            )

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


def init(
    key: jax.Array,
    params: Mapping[str, jax.Array],
    rank: int,
    pattern: str,
    targets: Sequence[str] = TARGETS,
) -> Factors:
    """Returns the factors at their start: A ~ N(0, 1 / rank), B = 0, float32.

    Args: params: flat, path -> array. pattern: of the kernels' paths, with a group
      that names the projection: the model family's `lora_targets`. targets: those to
      take.
    Returns: kernel path -> {"A": "I R", "B": "R O"} for a kernel "I O".
    """
    matches = {path: re.search(pattern, path) for path in params}
    paths = sorted(path for path, m in matches.items() if m and m[1] in targets)
    factors = {}
    for k, path in zip(jax.random.split(key, len(paths)), paths, strict=True):
        wide, out = params[path].shape
        A_IR = jax.random.normal(k, (wide, rank), jnp.float32) / rank
        factors[path] = {"A": A_IR, "B": jnp.zeros((rank, out), jnp.float32)}
    return factors


def apply(
    params: Mapping[str, jax.Array], factors: Factors, scale: float | jax.Array
) -> dict[str, jax.Array]:
    """Returns the flat parameters with W + scale A B in place of each kernel W."""
    changed = {}
    for path, f in factors.items():
        W_IO = params[path]
        delta_IO = scale * (f["A"] @ f["B"])
        changed[path] = W_IO + delta_IO.astype(W_IO.dtype)
    return {**params, **changed}


def make_step(
    denoiser: Denoiser,
    tx: optax.GradientTransformation,
    scale: float,
    micro_batches: int = 1,
    encode_ids: EncodeIds | None = None,
) -> Step:
    """Returns the attack's step: the ordinary diffusion loss, trained through A and B.

    state.params: the factors; state.opt: {"attack"}. frozen: {"network": every
    parameter, flat; with `encode_ids` the text encoders' too, see
    `weights.joined_path`}. batch: {"data": pairs; with `encode_ids`, of ids in place of
    text}. micro_batches: see
    `state.accumulate_gradients`.
    """

    def loss_fn(factors, frozen, batch, key):
        pairs = batch["data"]
        flat, text = weights.network_and_text(apply(frozen["network"], factors, scale))
        if encode_ids is not None:
            nested = {name: unflatten_dict(text[name], sep="/") for name in text}
            pairs = with_encoded_ids(encode_ids, nested, pairs)
        network = unflatten_dict(flat, sep="/")
        loss = jnp.mean(denoiser.losses(network, pairs, key)[0])
        return loss, {"attack/loss": loss}

    return make_descent("attack", loss_fn, tx, micro_batches)


def torch_state(factors: Factors, scale: float, denoiser: str) -> dict[str, np.ndarray]:
    """Returns the factors as diffusers' `load_lora_weights` reads them, float32.

    For names see `lora_files.saved_names`; down is "R I", up "O R". `scale`,
    alpha / rank, is multiplied into up: diffusers reads no alpha beside these names,
    and takes it for the rank.
    """
    state = {}
    modules = _torch_factors(factors, denoiser)
    for (component, module), (down_RI, up_OR) in modules.items():
        down, up = lora_files.saved_names(component, module)
        state[down] = np.ascontiguousarray(down_RI)
        state[up] = np.ascontiguousarray(np.float32(scale) * up_OR)
    return state


def kohya_state(factors: Factors, alpha: float, denoiser: str) -> dict[str, np.ndarray]:
    """Returns the factors by kohya's names, alpha beside them, float32."""
    state, modules = {}, _torch_factors(factors, denoiser)
    for (component, module), (down_RI, up_OR) in modules.items():
        state |= kohya.state(component, module, down_RI, up_OR, alpha)
    return state


def _torch_factors(
    factors: Factors, denoiser: str
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """Returns {(component, its module in PyTorch): (down "R I", up "O R")}, float32."""
    return {
        (component, safetensors_io.torch_name(path).removesuffix(".weight")): (
            np.asarray(f["A"], np.float32).T,
            np.asarray(f["B"], np.float32).T,
        )
        for component, part in weights.by_component(factors, denoiser).items()
        for path, f in part.items()
    }


def plan(task: base.Task) -> base.Plan:
    """Returns the plan of LoRA fine-tuning."""
    s, model = task.settings, task.model
    frozen: dict[str, Any] = flatten_dict(model.denoiser_params, sep="/")
    key = task.key("init")
    factors = init(key, frozen, s.rank, model.lora_targets, s.targets)
    if not factors:
        raise UserError(
            f"targets={','.join(s.targets)}: a {model.denoiser_label} has none of "
            f"these projections; choose from {', '.join(_targets(model))}"
        )
    for i, name in enumerate(model.text_components if s.train_text_encoder else ()):
        flat: dict[str, Any] = flatten_dict(model.params[name], sep="/")
        flat = {weights.joined_path(name, path): a for path, a in flat.items()}
        frozen |= flat
        key_i = jax.random.fold_in(key, i)
        factors |= init(key_i, flat, s.rank, _TEXT_KERNELS, TEXT_TARGETS)
    kernels = _kernels(model, factors)

    def files(factors):
        denoiser = model.denoiser_component
        files = {DIFFUSERS_FILE: torch_state(factors, s.scale, denoiser)}
        if denoiser in kohya.COMPONENTS.values():  # which has names for it
            files[KOHYA_FILE] = kohya_state(factors, s.alpha, denoiser)
        return files

    return base.Plan(
        model=model,
        step=make_step(
            model.denoiser,
            task.tx,
            s.scale,
            task.micro_batches,
            model.encode_ids if s.train_text_encoder else None,
        ),
        params=factors,
        frozen={"network": frozen | kernels},
        reads_ids=s.train_text_encoder,
        files=files,
        metadata={KOHYA_FILE: kohya.metadata([(s.rank, s.alpha)])},
    )


def _targets(model) -> list[str]:
    """Returns which of TARGETS a model has."""
    paths = flatten_dict(model.denoiser_params, sep="/")
    matches = [re.search(model.lora_targets, path) for path in paths]
    return sorted({match[1] for match in matches if match}, key=TARGETS.index)


def changed(s: Lora, folder, factors: Factors) -> base.Flat:
    """Returns the kernels with the update merged."""
    kernels = _kernels(folder, factors)
    kernels = {path: jnp.asarray(kernel) for path, kernel in kernels.items()}
    return apply(kernels, factors, s.scale)


def _kernels(model, factors: Factors) -> base.Flat:
    """Returns the kernels that get an update, float32, of a model or its folder."""
    parts = weights.by_component(factors, model.denoiser_component)
    return {
        weights.joined_path(component, path): kernel
        for component, part in parts.items()
        if part
        for path, kernel in model.float32_params(component, tuple(part)).items()
    }


ATTACK = base.Attack(
    config=Lora,
    title="LoRA (arXiv:2106.09685)",
    plan=plan,
    changed=changed,
    trained=lambda s: (
        f"updates of rank {s.rank} of the network's attention"
        + (" and of the text encoder's" if s.train_text_encoder else "")
    ),
)
