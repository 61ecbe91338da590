# SPDX-License-Identifier: Apache-2.0
"""From a model's name to its modules and parameters."""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from gift_jax.models import hub, safetensors_io
from gift_jax.models.base import Family
from gift_jax.models.flux import flux_1
from gift_jax.models.folder import existing, pipeline
from gift_jax.models.latent_diffusion import LatentDiffusion
from gift_jax.models.mmdit import stable_diffusion_3
from gift_jax.models.ops.kernels import Kernels
from gift_jax.models.sd import stable_diffusion
from gift_jax.models.sd.adapters import AdapterFiles
from gift_jax.models.sd.single_file import cache
from gift_jax.runtime import config
from gift_jax.runtime.devices import num_cores
from gift_jax.runtime.errors import UserError, choice, shown

_ASSETS = pathlib.Path(__file__).resolve().parents[1] / "assets"
EMBEDDED = _ASSETS / "emoji-sd"
EMBEDDED_FLOW = _ASSETS / "emoji-flow"  # a Stable Diffusion 3 in miniature
FAMILIES = (stable_diffusion.FAMILY, stable_diffusion_3.FAMILY, flux_1.FAMILY)
TRAINABLE_SETS = tuple(  # of the families' denoisers, names that mean the same as one
    dict.fromkeys(name for family in FAMILIES for name in family.trainable_sets)
)
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_PLATFORMS = {"flash": "tpu", "cudnn": "gpu"}  # that an attention needs
SMALL_BYTES = 2**30  # of a model's files


@dataclasses.dataclass(frozen=True)
class ModelFields:
    """The fields that name a model, of every config that has one."""

    model: str = config.value(
        "emoji-sd",
        "or emoji-flow, a diffusers folder, a hub id, a whole model's .safetensors",
    )
    revision: str = config.value("", "of a hub id: branch, tag or commit")
    variant: str = config.value(
        "", "of the weight files: fp16, or empty: the plain ones"
    )
    resolution: int = config.number(0, low=0, doc="pixels, square; 0: the model's own")
    compute_dtype: str = config.choice(
        "float32", tuple(DTYPES), "of the frozen part; what trains is float32"
    )
    adapters: AdapterFiles = config.group(AdapterFiles)


def pin_revision(fields: ModelFields, workdir: pathlib.Path) -> str:
    """Returns the commit of a hub id, which the run's config.json is to name.

    A run that goes on has the one that it began with; of a folder, what the config
    says.
    """
    if not hub.is_id(fields.model) or local_folder(fields.model).exists():
        return fields.revision
    path = workdir / "config.json"
    recorded = safetensors_io.read_json(path) if path.exists() else {}
    revision = fields.revision or recorded.get("revision", "")
    folder = hub.fetch(fields.model, revision, fields.variant)
    return hub.commit(folder) or revision


def model_folder(name: str, revision: str = "", variant: str = "") -> pathlib.Path:
    """Returns the folder of a model: a local one, an embedded one, or a hub id's copy.

    Of a single file it is the one that `local_folder` returns.
    """
    folder = local_folder(name)
    if not os.path.exists(folder) and hub.is_id(name):
        return hub.fetch(name, revision, variant)
    return folder


def local_folder(name: str) -> pathlib.Path:
    """Returns the folder of an embedded model, or the one that is named.

    It may not exist. Of a single file it is the folder that the file becomes, which is
    written if it is not there yet.
    """
    for embedded in (EMBEDDED, EMBEDDED_FLOW):
        if name == embedded.name:
            return embedded
    path = pathlib.Path(os.path.expanduser(name))
    return cache.folder_of(path) if cache.is_single_file(path) else path


def cpu_devices_to_draw(name: str) -> int:
    """Returns into how many devices to divide the cores to draw with a model.

    Each holds the weights: a large model, which keeps all cores busy anyway, is left
    on one.
    """
    return num_cores() if 0 < weight_bytes(local_folder(name)) < SMALL_BYTES else 1


def weight_bytes(folder: pathlib.Path) -> int:
    """Returns the size of a model folder's weight files; 0 if there are none."""
    return sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))


def load_model(
    name: str,
    dtype: str = "float32",
    *,
    revision: str = "",
    variant: str = "",
    resolution: int = 0,
    added: AdapterFiles | None = None,
) -> LatentDiffusion:
    """Returns a model, its parameters and arithmetic in `dtype`.

    Args: name: "emoji-sd", "emoji-flow", a diffusers folder, a single file, or a hub
      id, of which `revision` is fetched. variant: see `parts.read`. resolution:
      pixels, square; 0 is the model's own. added: files to merge into it.
    """
    choice("config.compute_dtype", dtype, tuple(DTYPES))
    folder = existing(model_folder(name, revision, variant))
    model = family_of(folder).load(
        folder, DTYPES[dtype], variant=variant, resolution=resolution
    )
    if added:
        model = model.with_adapters(read_adapters(added, folder, variant))
    logging.info("model %s, %d devices", model.path, jax.device_count())
    return model


def load_named(fields: ModelFields) -> LatentDiffusion:
    """Returns the model that a config's fields name, with the files they add."""
    return load_model(
        fields.model,
        fields.compute_dtype,
        revision=fields.revision,
        variant=fields.variant,
        resolution=fields.resolution,
        added=fields.adapters,
    )


def abstract_model(
    name: str, dtype: str = "float32", *, revision: str = "", resolution: int = 0
) -> LatentDiffusion:
    """Returns a model without its weights: its parameters are shapes.

    Of the published models nothing is downloaded; of another hub id only its configs.

    Args: see `load_model`.
    """
    for family in FAMILIES:
        if name in family.published:
            configs = family.published[name]
            return family.abstract_model(configs, DTYPES[dtype], resolution)
    folder = local_folder(name)
    if not folder.exists() and hub.is_id(name):
        folder = hub.fetch(name, revision, wanted=("*.json", "*/*.json"))
    family = family_of(existing(folder))
    configs = family.read_configs(folder)
    return family.abstract_model(configs, DTYPES[dtype], resolution)


def read_adapters(fields: AdapterFiles, folder: pathlib.Path, variant: str = "") -> Any:
    """Returns what files change of a model folder, see `sd.adapters.read_adapters`."""
    return family_of(folder).read_adapters(fields, folder, variant)


def family_of(folder: pathlib.Path) -> Family:
    """Returns the family that a folder's model is of, by its pipeline's class.

    A folder that names none is of the first.

    Raises: UserError for a class of no family.
    """
    name = pipeline(folder)
    for family in FAMILIES:
        if not name or name in family.pipelines:
            return family
    names = ", ".join(name for family in FAMILIES for name in family.pipelines)
    raise UserError(
        f"{folder / 'model_index.json'}: _class_name={shown(name)} is not supported; "
        f"must be one of {names}"
    )


def kernels_of(run: Any, mesh: Mesh | None) -> Kernels:
    """Returns how a run computes its layers; mesh: that of one that trains.

    Raises: UserError for an attention that the devices or the type do not have.
    """
    hardware = run.hardware
    kernels = Kernels(hardware.attention)
    if mesh:
        kernels = dataclasses.replace(kernels, remat=hardware.remat).on(mesh)
    field = f"config.hardware.attention={kernels.attention}"
    platform = _PLATFORMS.get(kernels.attention)
    if platform and kernels.device != platform:
        device = kernels.device.upper()
        raise UserError(
            f"{field} needs a {platform.upper()}, and this is a {device}; try auto"
        )
    if kernels.attention == "cudnn" and run.compute_dtype == "float32":
        raise UserError(f"{field} needs config.compute_dtype=bfloat16; or try auto")
    return kernels
