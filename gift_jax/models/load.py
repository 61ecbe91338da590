# SPDX-License-Identifier: Apache-2.0
"""From a model's name to its modules and parameters."""

import dataclasses
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from gift_jax.diffusion import Denoiser
from gift_jax.models import hooks, hub, weights
from gift_jax.models.kernels import Kernels
from gift_jax.models.sd import stable_diffusion
from gift_jax.models.trainable import select_trainable
from gift_jax.runtime.devices import num_cores
from gift_jax.runtime.errors import UserError, choice

EMBEDDED = pathlib.Path(__file__).resolve().parents[1] / "assets" / "emoji-sd"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_NEEDED = {"flash": "tpu", "cudnn": "gpu"}  # by which attention
_SMALL_BYTES = 2**30  # of a model's files


def model_folder(name: str, revision: str = "", variant: str = "") -> pathlib.Path:
    """Returns the folder of a model: a local one, "emoji-sd", or a hub id's copy."""
    folder = local_folder(name)
    if not os.path.exists(folder) and hub.is_id(name):
        return hub.fetch(name, revision, variant)
    return folder


def local_folder(name: str) -> pathlib.Path:
    """Returns the folder of "emoji-sd", or the one that is named; it may not exist."""
    return EMBEDDED if name == "emoji-sd" else pathlib.Path(os.path.expanduser(name))


def cpu_devices_to_draw(name: str) -> int:
    """Returns into how many devices to divide the cores to draw with a model.

    Each holds the weights: a large model, which keeps all cores busy anyway, is left
    on one.
    """
    folder = local_folder(name)
    size = sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))
    return num_cores() if 0 < size < _SMALL_BYTES else 1


def load_model(
    name: str,
    dtype: str = "float32",
    *,
    revision: str = "",
    variant: str = "",
    resolution: int = 0,
) -> stable_diffusion.StableDiffusion:
    """Returns a model, its parameters and arithmetic in `dtype`.

    Args: name: a diffusers folder, "emoji-sd", or a hub id, of which `revision` is
      fetched. variant, resolution: see `stable_diffusion.load`.
    """
    choice("config.compute_dtype", dtype, tuple(DTYPES))
    model = stable_diffusion.load(
        model_folder(name, revision, variant),
        DTYPES[dtype],
        variant=variant,
        resolution=resolution,
    )
    logging.info("model %s, %d devices", model.path, jax.device_count())
    return model


def kernels_of(cfg: Any, mesh: Mesh | None) -> Kernels:
    """Returns how a job computes its layers; mesh: that of one that trains.

    Raises: UserError for an attention that the devices or the type do not have.
    """
    how = Kernels(cfg.attention)
    if mesh:
        how = dataclasses.replace(how, remat=cfg.remat).on(mesh)
    field, needed = f"config.attention={how.attention}", _NEEDED.get(how.attention)
    if needed and how.device != needed:
        devices = f"a {needed.upper()}, and this is a {how.device.upper()}"
        raise UserError(f"{field} needs {devices}; try auto")
    if how.attention == "cudnn" and cfg.compute_dtype == "float32":
        raise UserError(f"{field} needs config.compute_dtype=bfloat16; or try auto")
    return how


def make_denoiser(model: stable_diffusion.StableDiffusion) -> Denoiser:
    """Returns the model's UNet and noise schedule as the methods see them."""
    # not the model: a compiled step would keep its weights alive
    unet, kernels = model.unet, model.kernels

    def predict(unet_params, z_t, t, text, capture):
        z_t, text = z_t.astype(unet.dtype), text.astype(unet.dtype)
        return hooks.apply_unet(unet, unet_params, z_t, t, text, capture, kernels)

    steps = stable_diffusion.noise_schedule(model).shape[0]
    return Denoiser(predict, model.prediction_type, steps)


def make_text_encoder(model: stable_diffusion.StableDiffusion):
    """Returns (nested parameters, int32 "B L" ids) -> text states, float32 "B L D"."""

    module = model.text_encoder

    def encode(text_params, ids):
        states = hooks.apply_text(module, text_params, ids)[0]
        return states.astype(jnp.float32)

    return encode


@dataclasses.dataclass(frozen=True)
class Split:
    """A UNet's parameters in two: float32 to train, compute dtype to keep."""

    trainable: dict[str, jax.Array]
    frozen: dict[str, jax.Array]


def float32_unet(model, paths: Iterable[str]) -> dict[str, jax.Array]:
    """Returns some of the UNet's parameters as they are on disk, flat, in float32."""
    return float32_params(model, "unet", paths)


def float32_params(model, component: str, paths: Iterable[str]):
    """Returns some of a component's parameters as they are on disk, flat, in float32.

    What trains starts from them: weights rounded to the compute dtype would end up in
    the exported model.
    """
    paths = set(paths)
    if jnp.dtype(model.unet.dtype) == jnp.float32 or model.path is None:
        flat = flatten_dict(model.params[component], sep="/")
        flat = {path: flat[path] for path in flat if path in paths}
        if model.path is None:  # an outline, which has no files
            return jax.tree.map(lambda a: a.astype(jnp.float32), flat)
        return flat
    _, params, _ = weights.load_component(
        model.path / component, component, variant=model.variant, only=paths
    )
    return jax.tree.map(jnp.asarray, flatten_dict(params, sep="/"))


def split_unet(model, rule: str) -> Split:
    """Returns the UNet's parameters divided by a rule of `partition.RULES`."""
    trainable, frozen = select_trainable(model.params["unet"], rule)
    trainable = float32_unet(model, trainable)
    count = sum(a.size for a in trainable.values())
    total = count + sum(a.size for a in frozen.values())
    logging.info("training %.3f M of %.3f M parameters", count / 1e6, total / 1e6)
    return Split(trainable, frozen)
