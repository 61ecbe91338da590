# SPDX-License-Identifier: Apache-2.0
"""Model folders: diffusers safetensors -> Flax parameters, files, content hash.

Everything is read as safetensors; see `safetensors_io` for names and layouts.
"""

import functools
import hashlib
import json
import re
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gift_jax.models import kinds, safetensors_io
from gift_jax.models.kinds import KINDS
from gift_jax.models.params import parameter_shapes
from gift_jax.models.weight_files import weight_files
from gift_jax.runtime.errors import UserError, one_line

WEIGHTS = (
    *safetensors_io.PICKLES,
    ".safetensors",
    ".msgpack",
    ".h5",
    ".onnx",
    ".onnx_data",
)
DENOISERS = {"unet": "UNet", "transformer": "transformer"}  # component: in words
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
COMPONENTS = (*DENOISERS, "vae", *TEXT_ENCODERS)  # whose weights are read
TOKEN_TABLE = "text_model/embeddings/token_embedding/embedding"
_HASHED = (".safetensors", ".json", ".txt")
_COUNTS = ("position_ids", "num_batches_tracked")  # ends of names, of no use
_WRAPPERS = {"_orig_mod.": "torch.compile", "module.": "a data-parallel run"}


@functools.lru_cache(maxsize=16)
def _shapes(kind, config):
    """{Flax path: shape} of a component with this config.json text."""
    module = KINDS[kind].build(json.loads(config))
    shapes = flatten_dict(parameter_shapes(module), sep="/")
    return {path: leaf.shape for path, leaf in shapes.items()}


def entries_by_path(directory, kind, variant=""):
    """Returns {Flax path: (name on disk, entry)}, complete and of the right shapes.

    Raises: UserError naming the file and the tensor that is missing, unexpected or of
      another shape than the folder's config.json says.
    """
    config = kinds.read_config(directory, kind)
    shapes = _shapes(kind, json.dumps(config))
    entries = {}
    for file in weight_files(directory, KINDS[kind].stem, variant):
        header = safetensors_io.read_header(file)
        for name in header.keys() & entries.keys():
            raise UserError(f"{file}: {name} is also in {entries[name].file.name}")
        entries |= header
    _check_unwrapped(entries)
    entry_of, missing = {}, []
    for path, shape in shapes.items():
        usual = safetensors_io.torch_name(path)
        name = usual if usual in entries else KINDS[kind].other_name(usual)
        if name not in entries:
            missing.append(usual)
            continue
        entry, expected = entries[name], safetensors_io.torch_shape(path, shape)
        as_conv = (*expected, 1, 1)  # very old VAEs keep attention as 1x1 convolutions
        if entry.shape not in (expected, as_conv if kind == "vae" else expected):
            raise UserError(
                f"{entry.file}: {name} has shape {list(entry.shape)}, but config.json "
                f"says {list(expected)}; weights and config are of different models"
            )
        entry_of[path] = (name, entry)
    used = {name for name, _ in entry_of.values()} | set(KINDS[kind].unread)
    extra = [n for n in entries if n not in used and not n.endswith(_COUNTS)]
    for what, names in (("missing", missing), ("unexpected", extra)):
        if names:
            raise UserError(
                f"{directory}: {len(names)} {what} tensors, e.g. "
                f"{one_line(sorted(names)[0])}; weights and config.json are of "
                "different models"
            )
    return entry_of


def _check_unwrapped(entries):
    for name, entry in entries.items():
        for prefix, wrapper in _WRAPPERS.items():
            if name.startswith(prefix):
                raise UserError(
                    f"{entry.file}: its tensors' names begin with {prefix!r}, as "
                    f"{wrapper} has them, and libraries do not find them; save the "
                    f"model inside it (model.{prefix}save_pretrained)"
                )


def load_component(
    directory, kind, dtype=np.float32, *, variant="", only=None, place=np.asarray
):
    """Returns (module, params, config) of one component folder.

    Args:
      directory: holds config.json and safetensors (one file or shards; float32,
        float16 or bfloat16). kind: of `KINDS`.
      dtype: of the returned parameters and of the module's computation.
      variant: which files, see `weight_files`. only: Flax paths to read, all
        by default. place: called on every array as it is read, e.g. to put it on a
        device before the next one is: one tensor more than the result is in memory.
    Returns: a Flax module, its parameters (nested dict of NumPy arrays, or of what
      `place` returns), the config.
    Raises: UserError naming the file, if one is missing, malformed or unsupported.
    """
    directory = Path(directory)
    config = kinds.read_config(directory, kind)
    module = KINDS[kind].build(config, dtype)
    params = {}
    for path, (name, entry) in entries_by_path(directory, kind, variant).items():
        if only is None or path in only:
            array = to_flax(path, safetensors_io.read_tensor(name, entry))
            array = np.ascontiguousarray(array, dtype).reshape(array.shape)
            params[path] = place(array)
    return module, unflatten_dict(params, sep="/"), config


def to_flax(path, array):
    """Returns a tensor of a file laid out as the Flax parameter of this path."""
    if path.endswith("/kernel") and array.ndim == 4:
        array = _drop_conv_axes(path, array)
    return safetensors_io.from_torch_layout(path, array)


def _drop_conv_axes(path, array):
    is_attention = re.search(r"/(query|key|value|proj_attn)/kernel$", path)
    return array[:, :, 0, 0] if is_attention else array


def joined_path(component, path):
    """Returns what a component's parameter is called among those of all components.

    The denoiser's and the first text encoder's differ by themselves.
    """
    return f"{component}/{path}" if component in TEXT_ENCODERS[1:] else path


def network_and_text(flat):
    """Returns (the denoiser's parameters, {text encoder: its own}), all flat.

    Args: flat: {path, see `joined_path`: array}.
    """
    network, text = {}, {component: {} for component in TEXT_ENCODERS}
    for path, array in flat.items():
        top, _, rest = path.partition("/")
        if top in TEXT_ENCODERS[1:]:
            text[top][rest] = array
        elif top in ("text_model", "text_projection"):
            text["text_encoder"][path] = array
        else:
            network[path] = array
    return network, text


def by_component(flat, denoiser):
    """Returns {denoiser: ..., "text_encoder": ..., "text_encoder_2": ... and so on}.

    Args: flat: {path, see `joined_path`: array}. denoiser: the component's name.
    """
    network, text = network_and_text(flat)
    return {denoiser: network, **text}


def denoiser_of(root):
    """Returns the name of the component of a diffusers folder that is the denoiser."""
    names = [name for name in DENOISERS if (Path(root) / name).is_dir()]
    return next(iter(names), next(iter(DENOISERS)))


def components(root):
    """Returns those of `COMPONENTS` that a diffusers folder has."""
    return tuple(name for name in COMPONENTS if (Path(root) / name).is_dir())


def model_files(base):
    """Returns the files of a diffusers folder's pipeline, hidden ones aside, sorted.

    Besides the root's files, only those of components that model_index.json names.
    """
    index = safetensors_io.read_json(base / "model_index.json")
    components = {k for k, v in index.items() if isinstance(v, list) and any(v)}
    files = []
    for file in sorted(p for p in base.rglob("*") if p.is_file()):
        parts = file.relative_to(base).parts
        hidden = any(part.startswith(".") for part in parts)
        if not hidden and (len(parts) == 1 or parts[0] in components):
            files.append(file)
    return files


def content_hash(directory):
    """Returns the sha256, hex, of a folder's weight and config files, names too."""
    directory, digest = Path(directory), hashlib.sha256()
    files = sorted(
        (p.relative_to(directory).as_posix(), p)
        for p in directory.rglob("*")
        if p.is_file() and p.suffix in _HASHED
    )
    for name, file in files:
        if any(part.startswith(".") for part in Path(name).parts):
            continue
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as f:
            while block := f.read(2**20):
                digest.update(block)
    return digest.hexdigest()
