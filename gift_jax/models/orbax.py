# SPDX-License-Identifier: Apache-2.0
"""A whole model as an Orbax checkpoint, and back, tensor for tensor.

The checkpoint's folder holds one Orbax checkpoint a component (unet, vae,
text_encoder, maybe text_encoder_2), Flax names and layouts, each tensor in its own
dtype; `files/` with the rest of the diffusers folder as it was; and `layout.json`,
which says how the tensors lie in safetensors files.
"""

import json
import math
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from gift_jax.models import dtype_labels, safetensors_io, weight_files, weights
from gift_jax.models.kinds import KINDS, kind_of
from gift_jax.runtime import files
from gift_jax.runtime.errors import UserError

LAYOUT = "layout.json"
_FORMAT = 1
_READ_AHEAD = 2**28  # bytes of tensors restored together


def save(model_dir, out, *, variant="", dtype=None):
    """Writes a diffusers folder as an Orbax checkpoint, atomically.

    One component is in memory at a time.

    Args: model_dir: a diffusers folder of safetensors. out: must not exist. variant:
      see `weight_files`. dtype: of `safetensors_io.DTYPES`, to cast every weight to;
      None keeps each tensor's own.
    Raises: UserError naming file and tensor, before anything is written.
    """
    root = Path(model_dir)
    names_of = {
        name: _component(root / name, kind_of(root, name), variant)
        for name in weights.components(root)
    }
    with files.atomic_folder(out) as temp:
        layout = {"format": _FORMAT, "components": {}}
        for component, (names, paths) in names_of.items():
            layout["components"][component] = _layout(names, paths, dtype)
            tree = _read(paths, dtype)
            handler = ocp.StandardCheckpointHandler(
                save_concurrent_gb=1,
                use_ocdbt=False,  # which would hold a second copy of everything
            )
            with ocp.Checkpointer(handler) as checkpointer:  # one that waits
                checkpointer.save(temp / component, unflatten_dict(tree, sep="/"))
            del tree
            logging.info("%s: %d tensors", component, len(paths))
        _copy_files(root, temp / "files")
        (temp / LAYOUT).write_text(json.dumps(layout, indent=1) + "\n")


def restore(checkpoint, out, *, dtype=None):
    """Writes the diffusers folder that `save` was given, atomically.

    Every file is what it was, but for what `dtype_labels` changes.

    Args: checkpoint: a folder written by `save`. out: must not exist. dtype: as in
      `save`.
    Raises: UserError if the checkpoint is incomplete or of another format.
    """
    root = Path(checkpoint).absolute()
    layout = safetensors_io.read_json(root / LAYOUT)
    if layout.get("format") != _FORMAT:
        raise UserError(
            f"{root / LAYOUT}: format={layout.get('format')!r}; this version reads "
            f"format {_FORMAT}"
        )
    with files.atomic_folder(out) as temp:
        shutil.copytree(root / "files", temp, dirs_exist_ok=True)
        for kind, names in layout["components"].items():
            items = [item for content in names.values() for item in content["tensors"]]
            paths = [item["path"] for item in items if "path" in item]
            params = _Tensors(root / kind, paths)
            for name, content in names.items():
                _write(temp / kind / name, content, params, dtype)
            logging.info("%s: %d tensors", kind, len(paths))
        dtype_labels.write(temp)


def is_model_checkpoint(folder):
    """Whether a folder was written by `save`."""
    return (Path(folder) / LAYOUT).is_file()


def _component(directory, kind, variant):
    """Returns (weight files, {Flax path: (name, entry)}) of one component, checked."""
    paths = weights.entries_by_path(directory, kind, variant)
    return weight_files.weight_files(directory, KINDS[kind].stem, variant), paths


def _read(paths, dtype):
    """Returns {Flax path: array on the device}, one tensor on the host at a time."""
    tree = {}
    for path, (name, entry) in paths.items():
        array = safetensors_io.read_tensor(name, entry)
        if dtype is not None:
            array = safetensors_io.cast(name, array, dtype)
        array = weights.to_flax(path, array)
        tree[path] = jnp.asarray(array)
    return tree


def _layout(weight_files, paths, dtype):
    """Returns {file name: how its tensors lie in it}.

    A tensor without a Flax parameter (a buffer such as position_ids) is kept here, as
    a list: there are only small ones.
    """
    by_name = {name: path for path, (name, _) in paths.items()}
    layout = {}
    for file in weight_files:
        content = []
        entries = safetensors_io.read_header(file)
        for name in sorted(entries, key=lambda name: entries[name].begin):
            entry = entries[name]
            item = {"name": name, "dtype": entry.dtype, "shape": list(entry.shape)}
            if name in by_name:
                item |= {"path": by_name[name]} | ({"dtype": dtype} if dtype else {})
            else:
                array = safetensors_io.read_tensor(name, entry, only_floats=False)
                item["values"] = array.tolist()
            content.append(item)
        metadata = safetensors_io.read_metadata(file)
        layout[file.name] = {"metadata": metadata, "tensors": content}
    return layout


def _copy_files(root, out):
    """Copies what is neither a weight that was read nor another copy of one."""
    for source in weights.model_files(root):
        relative = source.relative_to(root)
        is_weight = source.suffix in weights.WEIGHTS
        if is_weight and (
            len(relative.parts) == 1 or relative.parts[0] in weights.COMPONENTS
        ):
            continue
        target = out / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


class _Tensors:
    """The tensors of one component's Orbax checkpoint, read some at a time.

    Args: paths: Flax paths, in the order in which they will be asked for.
    """

    def __init__(self, folder, paths):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; the checkpoint is incomplete")
        self._folder, self._paths, self._ready = folder, list(paths), {}
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(folder).item_metadata.tree
        self._saved = flatten_dict(tree, sep="/")
        missing = sorted(set(self._paths) - set(self._saved))
        if missing:
            raise UserError(f"{folder}: has no {missing[0]}; the checkpoint is damaged")

    def pop(self, path):
        """Returns one tensor, a NumPy array, and forgets it."""
        if path not in self._ready:
            self._ready |= self._read(self._next(self._paths.index(path)))
        return self._ready.pop(path)

    def _next(self, first):
        chosen, size = [], 0
        for path in self._paths[first:]:
            chosen.append(path)
            size += math.prod(self._saved[path].shape) * 4
            if size > _READ_AHEAD:
                break
        return chosen

    def _read(self, paths):
        saved = {path: self._saved[path] for path in paths}
        args = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in paths}
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.restore(
                self._folder,
                args=ocp.args.PyTreeRestore(
                    item=unflatten_dict(saved, sep="/"),
                    restore_args=unflatten_dict(args, sep="/"),
                    partial_restore=True,
                ),
            )
        return flatten_dict(tree, sep="/")


def _write(file, content, params, dtype):
    """Writes one safetensors file as its layout says."""
    table = {}
    for item in content["tensors"]:
        name, shape = item["name"], tuple(item["shape"])
        known = item["dtype"]
        if "path" in item and dtype is not None:
            known = dtype
        table[name] = known, shape, _reader(item, params, known)
    safetensors_io.write_file(file, table, content["metadata"])


def _reader(item, params, dtype):
    def read():
        if "path" not in item:
            return np.asarray(item["values"], safetensors_io.ALL_DTYPES[dtype])
        array = safetensors_io.to_torch_layout(item["path"], params.pop(item["path"]))
        return safetensors_io.cast(item["name"], array, dtype)

    return read
