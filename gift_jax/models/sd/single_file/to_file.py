# SPDX-License-Identifier: Apache-2.0
"""A model folder as a single file, tensor for tensor, with a ModelSpec header.

Source: https://github.com/Stability-AI/ModelSpec, 1.0.0.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gift_jax.models import safetensors_io, weight_files
from gift_jax.models.folder import existing
from gift_jax.models.safetensors_io import Entry
from gift_jax.models.sd.single_file import configs as single_configs
from gift_jax.models.sd.single_file import families, folder_configs
from gift_jax.models.sd.single_file.from_file import STEMS, Table
from gift_jax.models.sd.single_file.tensors import Tensor
from gift_jax.runtime import files
from gift_jax.runtime.errors import UserError, one_line

_SPEC = {
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
}
_ARCHITECTURES = {
    ("sd15", "epsilon"): "stable-diffusion-v1",
    ("sd15", "v_prediction"): "stable-diffusion-v1",
    ("sd21", "epsilon"): "stable-diffusion-v2-512",
    ("sd21", "v_prediction"): "stable-diffusion-v2-768-v",
    ("sdxl", "epsilon"): "stable-diffusion-xl-v1-base",
    ("sdxl", "v_prediction"): "stable-diffusion-xl-v1-base",
}


def convert(
    folder: Path, out: Path, *, variant: str = "", dtype: str | None = None
) -> None:
    """Writes a model folder as a single file, whole or not at all.

    One tensor is in memory at a time, three where a file joins them; each keeps its
    bytes and its dtype. What a file does not hold is left out: tokenizer, safety
    checker, the scheduler's class.

    Args: variant: of the folder's weight files. dtype: of `safetensors_io.DTYPES`, to
      cast every weight to; None keeps each tensor's own.
    Raises: UserError naming the file and the tensor or key that a single file cannot
      hold, before anything is written.
    """
    root = existing(folder)
    configs = folder_configs.read(root)
    family = folder_configs.family_of(configs)
    pixels = folder_configs.resolution(configs)
    prediction = configs["scheduler"]["prediction_type"]
    zero_snr = bool(configs["scheduler"].get("rescale_betas_zero_snr"))
    table: Table = {}
    for component, rows in single_configs.all_tensors(configs, family).items():
        found = _read(root / component, STEMS[component], variant)
        table |= _table(root / component, rows, found, dtype)
    shapes = {name: shape for name, (_, shape, _) in table.items()}
    expected = single_configs.infer(
        *(root, shapes, family, prediction), resolution=pixels, zero_snr=zero_snr
    )
    for component, config in configs.items():
        folder_configs.check_same(root, component, config, expected[component])
    header = _SPEC | {
        families.ARCHITECTURE: _ARCHITECTURES[family.name, prediction],
        families.PREDICTION: {"v_prediction": "v"}.get(prediction, prediction),
        "modelspec.title": out.stem,
    }
    if pixels:
        header["modelspec.resolution"] = f"{pixels}x{pixels}"
    marks = [families.V_KEY] * (family.name == "sdxl" and prediction != "epsilon")
    for mark in marks + [families.ZERO_SNR_KEY] * zero_snr:  # readers look for them
        table[mark] = "F32", (0,), lambda: np.zeros(0, np.float32)
    with files.atomic_write(out) as aside:
        safetensors_io.write_file(aside, table, {"format": "pt", **header})


# --- tensors --------------------------------------------------------------------------


def _read(directory: Path, stem: str, variant: str) -> dict[str, Entry]:
    """Returns the tensors of a component, by today's names."""
    entries = {}
    for file in weight_files.weight_files(directory, stem, variant):
        entries |= safetensors_io.read_header(file)
    if stem == "model":  # transformers 5 writes its class without the prefix
        return {
            name if name.startswith("text_") else f"text_model.{name}": entry
            for name, entry in entries.items()
        }
    return entries


def _table(
    directory: Path,
    rows: list[Tensor],
    found: Mapping[str, Entry],
    dtype: str | None,
) -> Table:
    """Returns what to write of one component; see `safetensors_io.write_file`."""
    sources: dict[str, list[tuple[Tensor, Entry]]] = {}
    used, missing = set(), []
    for tensor in rows:
        old = safetensors_io.old_name(tensor.name)  # of the VAE's attention
        name = next((n for n in (tensor.name, old) if n in found), "")
        if name:
            used.add(name)
            _check_tensor(tensor, found[name])
            sources.setdefault(tensor.original, []).append((tensor, found[name]))
        elif not tensor.optional:
            missing.append(tensor.name)
    extra = [name for name in found if name not in used]
    extra = [name for name in extra if not name.endswith("position_ids")]
    for what, names in (("missing", missing), ("unexpected", extra)):
        if names:
            raise UserError(
                f"{directory}: {len(names)} {what} tensors, e.g. "
                f"{one_line(min(names))}; weights and config.json are of different "
                "models"
            )
    return {name: _in_file(parts, dtype) for name, parts in sources.items()}


def _check_tensor(tensor: Tensor, entry: Entry) -> None:
    at = f"{one_line(entry.file)}: {tensor.name}"
    as_conv = (*tensor.shape, 1, 1) if tensor.form == "conv" else tensor.shape
    if entry.shape not in (tensor.shape, as_conv):
        raise UserError(
            f"{at} has shape {list(entry.shape)}, but config.json says "
            f"{list(tensor.shape)}; weights and config are of different models"
        )
    if entry.dtype not in safetensors_io.DTYPES and not tensor.optional:
        known = ", ".join(safetensors_io.DTYPES)
        raise UserError(f"{at} has dtype {entry.dtype}; must be one of {known}")


def _in_file(parts: list[tuple[Tensor, Entry]], dtype: str | None) -> tuple:
    """Returns what to write of one tensor of the file, which joins some of a folder's.

    Args: parts: query, key and value in this order, or one alone; of several dtypes
      they become float32.
    """
    shape, known = parts[0][0].original_shape, dtype
    types = {entry.dtype for _, entry in parts}
    if not known or not types <= safetensors_io.DTYPES.keys():
        known = types.pop() if len(types) == 1 else "F32"
    known_dtype = known

    def read() -> np.ndarray:
        arrays = []
        for tensor, entry in parts:
            name = tensor.name
            array = safetensors_io.read_tensor(name, entry, only_floats=False)
            array = array.T if tensor.form == "transposed" else array
            if known_dtype in safetensors_io.DTYPES:
                array = safetensors_io.cast(name, array, known_dtype)
            arrays.append(array)
        return np.concatenate(arrays) if len(arrays) > 1 else arrays[0]

    return known, shape, read
