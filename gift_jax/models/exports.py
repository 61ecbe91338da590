# SPDX-License-Identifier: Apache-2.0
"""Writes model folders: one component, or a base model with some tensors replaced."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from absl import logging
from flax.traverse_util import flatten_dict

from gift_jax.models import dtype_labels, safetensors_io, weight_files
from gift_jax.models.kinds import KINDS, effective, kind_of
from gift_jax.models.tokenizer import write_added_tokens
from gift_jax.models.weights import (
    COMPONENTS,
    DENOISERS,
    TEXT_ENCODERS,
    TOKEN_TABLE,
    WEIGHTS,
    by_component,
    components,
    denoiser_of,
    entries_by_path,
    joined_path,
    model_files,
)
from gift_jax.runtime import files
from gift_jax.runtime.errors import UserError


def save_model_folder(directory, config, params, dtype=np.float32):
    """Writes one component (config.json, safetensors) for diffusers, atomically.

    Args: config: as `load_component` returns or the modules are built from.
      params: nested or flat ("a/b") dict of Flax parameters; they tell which kind of
      component it is. dtype: on disk.
    """
    flat = flatten_dict(params, sep="/")
    kind, by_name = _kind_by_parameters(flat), {}
    for path, array in flat.items():
        array = safetensors_io.to_torch_layout(path, np.asarray(jax.device_get(array)))
        by_name[safetensors_io.torch_name(path)] = np.ascontiguousarray(
            array, dtype
        ).reshape(array.shape)
    with files.atomic_folder(directory) as temp:
        text = json.dumps(KINDS[kind].extra_config | config, indent=2, sort_keys=True)
        (temp / "config.json").write_text(text + "\n", encoding="utf-8")
        file = temp / f"{KINDS[kind].stem}.safetensors"
        safetensors.numpy.save_file(by_name, file, metadata={"format": "pt"})


def _kind_by_parameters(flat):
    tops = {path.split("/")[0] for path in flat}
    for top, kind in (
        ("vision_model", "clip"),
        ("text_projection", "text_encoder_2"),
        ("text_model", "text_encoder"),
        ("decoder", "vae"),
        ("down_blocks_0", "unet"),
        ("single_transformer_blocks_0", "flux_transformer"),
        ("transformer_blocks_0", "transformer"),
        ("shared", "text_encoder_3"),
    ):
        if top in tops:
            return kind
    raise ValueError(f"parameters of no known component: {sorted(tops)}")


def export(
    base_dir, changed, out_dir, variant="", dtype=None, tokenizer=None, readme=""
):
    """Writes the base model folder with some tensors replaced, atomically.

    Untouched tensors, the other components, the file layout and the names of tensors
    stay byte for byte; of configs, all but what `dtype_labels` changes. Left out, since
    they would hold the original weights or cannot be checked: pickles, single-file
    checkpoints, and further variants of the denoiser, or of a text encoder where that
    changed. (A component that has only pickles, as some safety checkers, keeps them,
    unread.)

    Args: base_dir: a diffusers folder. changed: {Flax path, see `joined_path`, of the
        denoiser or a text encoder: array}; cast to the dtype of the file. A
        `TOKEN_TABLE` may have another number of rows; vocab_size follows. out_dir:
        replaced if it exists. variant: which of the base's files the model was read
        from. dtype: of `safetensors_io.DTYPES`, to cast every weight of denoiser, VAE
        and text encoders to; None keeps each tensor's own. tokenizer: of transformers,
        whose tokens beyond the base's are added to each of the base's. readme:
        README.md, in place of the base's.
    Raises: UserError for an unknown path, a wrong shape, a value that does not fit.
    """
    base, out = Path(base_dir).absolute(), Path(out_dir).absolute()
    if out == base or base in out.parents or out in base.parents:
        raise UserError(f"{out}: cannot export into the base model {base} itself")
    entries, kept = {}, {}
    for name, arrays in by_component(changed, denoiser_of(base)).items():
        if name not in DENOISERS and not arrays:
            continue
        kind = kind_of(base, name)
        entry_of = entries_by_path(base / name, kind, variant)
        unknown = sorted(set(arrays) - set(entry_of))
        if unknown:
            label = DENOISERS.get(name, name.replace("_", " "))
            raise UserError(f"{base}: its {label} has no parameter {unknown[0]!r}")
        entries |= {joined_path(name, path): entry_of[path] for path in entry_of}
        kept[name] = set(
            weight_files.weight_files(base / name, KINDS[kind].stem, variant)
        )
    resized = _resized_table(changed, entries)
    with files.atomic_folder(out) as temp:
        left_out = _copy_model(base, temp, kept)
        if left_out:
            logging.warning("export leaves out %s", ", ".join(left_out))
        for path, array in changed.items():
            name, entry = entries[path]
            file = temp / entry.file.relative_to(base)
            if path in resized:
                continue
            data = _encode(path, name, entry, array)
            with file.open("r+b") as f:
                f.seek(entry.begin)
                f.write(data)
        for path in resized:  # last: it moves what comes after it in its file
            name, entry = entries[path]
            _resize(temp / entry.file.relative_to(base), name, changed[path])
        if tokenizer is not None:
            for folder in temp.glob("tokenizer*"):
                write_added_tokens(tokenizer, folder)
        if readme:
            (temp / "README.md").write_text(readme, encoding="utf-8")
        if dtype is not None:
            for component in components(temp):
                for file in sorted((temp / component).glob("*.safetensors")):
                    _recast_file(file, dtype)
        dtype_labels.write(temp)


def _resized_table(changed, entries):
    """Returns the paths of token tables that changed their number of rows."""
    resized = []
    for component in TEXT_ENCODERS:
        path = joined_path(component, TOKEN_TABLE)
        if path in changed:
            old, new = entries[path][1].shape, changed[path].shape
            if new != old and new[1:] == old[1:]:
                resized.append(path)
    return tuple(resized)


def _resize(file, name, table):
    """Puts a token table of another number of rows into a text encoder's file."""

    def replace(key, entry):
        if key != name:
            return _as_it_is(key, entry)
        array = safetensors_io.cast(
            name, np.asarray(jax.device_get(table)), entry.dtype
        )
        return entry.dtype, array.shape, lambda: array

    _rewrite_file(file, replace)
    config = safetensors_io.read_json(file.parent / "config.json")
    effective(file.parent.name, config)["vocab_size"] = len(table)
    text = json.dumps(config, indent=2, sort_keys=True)
    (file.parent / "config.json").write_text(text + "\n", encoding="utf-8")


def in_torch_layout(path, array, name, entry) -> np.ndarray:
    """Returns a parameter as PyTorch lays it out.

    Args: path: its Flax path. name, entry: of the tensor in the base's file.
    Raises: UserError if that one has another shape.
    """
    array = safetensors_io.to_torch_layout(path, np.asarray(jax.device_get(array)))
    if array.shape != entry.shape:
        raise UserError(
            f"{path}: has PyTorch shape {list(array.shape)}, the base {name} has "
            f"{list(entry.shape)}"
        )
    return array


def _encode(path, name, entry, array):
    array = in_torch_layout(path, array, name, entry)
    return safetensors_io.cast(name, array, entry.dtype).tobytes()


def _recast_file(file, dtype):
    def recast(name, entry):
        disk_dtype, shape, read = _as_it_is(name, entry)
        if disk_dtype in safetensors_io.DTYPES:
            disk_dtype = dtype
        return disk_dtype, shape, lambda: safetensors_io.cast(name, read(), dtype)

    _rewrite_file(file, recast)


def _as_it_is(name, entry):
    def read():
        return safetensors_io.read_tensor(name, entry, only_floats=False)

    return entry.dtype, entry.shape, read


def _rewrite_file(file, change):
    """Rewrites a safetensors file, its order kept; change: see `_as_it_is`."""
    entries, aside = safetensors_io.read_header(file), file.with_suffix(".new")
    by_place = sorted(entries.items(), key=lambda item: item[1].begin)
    table = {name: change(name, entry) for name, entry in by_place}
    safetensors_io.write_file(aside, table, safetensors_io.read_metadata(file))
    aside.replace(file)


def _copy_model(base, temp, kept):
    """Copies what belongs to the pipeline; returns what was left out.

    Args: kept: component -> its weight files to copy; of others, all are.
    """
    left_out = []
    for source in model_files(base):
        relative = source.relative_to(base)
        if _is_left_out(source, relative, kept):
            left_out.append(str(relative))
            continue
        target = temp / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return left_out


def _is_left_out(source, relative, kept):
    top, is_weight = relative.parts[0], source.suffix in WEIGHTS
    if len(relative.parts) == 1:
        return is_weight
    if top in kept:
        if re.search(r"\.index(\.\w+)?\.json$", source.name):
            return not set(weight_files.shards(source)) <= kept[top]
        return is_weight and source not in kept[top]
    if source.suffix not in safetensors_io.PICKLES:
        return False
    return top in COMPONENTS or any(source.parent.glob("*.safetensors"))
