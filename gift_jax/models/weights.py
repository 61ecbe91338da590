# SPDX-License-Identifier: Apache-2.0
"""Model folders: diffusers safetensors <-> Flax parameters, export, content hash.

Everything is read and written as safetensors; pickles are never opened. A parameter is
named here by its Flax path, "down_blocks_0/attentions_0/.../attn2/to_k/kernel"; on disk
it has PyTorch's name, "down_blocks.0.attentions.0....attn2.to_k.weight", and layout.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from gift_jax.config import UserError
from gift_jax.models import hooks

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_WEIGHTS = (*PICKLES, ".safetensors", ".msgpack", ".h5", ".onnx", ".onnx_data")
_HASHED = (".safetensors", ".json", ".txt")
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class Kind(NamedTuple):
    """How one component of a model folder is built, and what its files are called."""

    build: object
    stem: str
    extra_config: dict


KINDS = {
    "unet": Kind(
        hooks.build_unet,
        "diffusion_pytorch_model",
        {"_class_name": "UNet2DConditionModel"},
    ),
    "vae": Kind(
        hooks.build_vae, "diffusion_pytorch_model", {"_class_name": "AutoencoderKL"}
    ),
    "text_encoder": Kind(
        hooks.build_text,
        "model",
        {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"},
    ),
    "clip": Kind(
        hooks.build_clip,
        "model",
        {"architectures": ["CLIPModel"], "model_type": "clip"},
    ),
}


class _Entry(NamedTuple):
    file: Path
    dtype: str
    shape: tuple
    begin: int  # bytes from the start of the file
    end: int


# --- names ----------------------------------------------------------------------------


def torch_name(path):
    """Returns the PyTorch name of a Flax path "a/b_0/kernel"."""
    *modules, leaf = path.split("/")
    parts = [
        m if m.startswith("linear_") else re.sub(r"_(\d+)$", r".\1", m) for m in modules
    ]
    if parts and re.search(r"(en|de)coder/mid_block/attentions_\d+/", path):
        new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        parts[-1] = new.get(parts[-1], parts[-1])
    leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf, leaf)
    return ".".join([*parts, leaf])


def _old_name(name):
    """The name diffusers gave the VAE's attention before 0.18, and SD 1.x files have."""
    for new, old in (
        (".to_q.", ".query."),
        (".to_k.", ".key."),
        (".to_v.", ".value."),
        (".to_out.0.", ".proj_attn."),
    ):
        name = name.replace(new, old)
    return name


def to_torch_layout(path, array):
    """Returns the array laid out as PyTorch stores the parameter of this Flax path."""
    if path.endswith("/kernel"):
        return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return array


def _torch_shape(path, shape):
    return to_torch_layout(path, np.empty(shape, np.bool_)).shape


def _from_torch_layout(path, array):
    if path.endswith("/kernel"):
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return array


# --- safetensors files ----------------------------------------------------------------


def read_header(file):
    """Returns {name: _Entry} of one safetensors file, checked against its length.

    Raises: UserError if it is missing, truncated, or not a safetensors file.
    Source: https://github.com/huggingface/safetensors, "Format".
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; the model folder is incomplete")
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{file}: truncated or not a safetensors file; copy it again")
        try:
            header = json.loads(f.read(length))
        except ValueError as error:
            raise UserError(f"{file}: its header is not JSON ({error})") from None
    header.pop("__metadata__", None)
    start, entries = 8 + length, {}
    for name, info in header.items():
        begin, end = (start + offset for offset in info["data_offsets"])
        if end > size:
            raise UserError(
                f"{file}: truncated: {size} bytes, but {name} ends at byte {end}; "
                "copy it again"
            )
        entries[name] = _Entry(file, info["dtype"], tuple(info["shape"]), begin, end)
    return entries


def _read_tensor(name, entry):
    if entry.dtype not in _DTYPES:
        known = ", ".join(_DTYPES)
        raise UserError(
            f"{entry.file}: {name} has dtype {entry.dtype}; must be one of {known}"
        )
    raw = np.memmap(entry.file, np.uint8, "r")[entry.begin : entry.end]
    return raw.view(_DTYPES[entry.dtype]).reshape(entry.shape)


def weight_files(directory, stem):
    """Returns the safetensors files of a component: one, its shards, or its variant.

    Raises: UserError if there is none; says so if there are only pickles.
    """
    single = directory / f"{stem}.safetensors"
    if single.is_file():
        return [single]
    index = directory / f"{stem}.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(read_json(index)["weight_map"].values()))
        return [directory / shard for shard in shards]
    variants = sorted(directory.glob(f"{stem}.*.safetensors"))
    if len(variants) == 1:
        return variants
    pickles = [p.name for p in directory.glob("*") if p.suffix in PICKLES]
    if pickles:
        raise UserError(
            f"{directory}: has only {pickles[0]}, a pickle, which can run code and is "
            "never loaded; save the model as safetensors "
            "(save_pretrained(..., safe_serialization=True))"
        )
    raise UserError(f"{directory}: no {single.name}; is this a diffusers model folder?")


def read_json(file):
    """Returns a JSON file's object; UserError if it is missing or malformed."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file}: no such file; is this a model folder?") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None


# --- loading --------------------------------------------------------------------------


def _entries_by_path(directory, kind, module):
    """Returns {Flax path: (name on disk, entry)}, complete and of the right shapes."""
    shapes = flatten_dict(hooks.parameter_shapes(module), sep="/")
    entries = {}
    for file in weight_files(directory, KINDS[kind].stem):
        entries |= read_header(file)
    found, missing = {}, []
    for path, leaf in shapes.items():
        name = torch_name(path)
        if name not in entries:
            name = _old_name(name)
        if name not in entries:
            missing.append(torch_name(path))
            continue
        entry, expected = entries[name], _torch_shape(path, leaf.shape)
        as_conv = (*expected, 1, 1)  # very old VAEs keep attention as 1x1 convolutions
        if entry.shape not in (expected, as_conv if kind == "vae" else expected):
            raise UserError(
                f"{entry.file}: {name} has shape {list(entry.shape)}, but config.json "
                f"says {list(expected)}; weights and config are of different models"
            )
        found[path] = (name, entry)
    used = {name for name, _ in found.values()}
    extra = [n for n in entries if n not in used and not n.endswith("position_ids")]
    for what, names in (("missing", missing), ("unexpected", extra)):
        if names:
            raise UserError(
                f"{directory}: {len(names)} {what} tensors, e.g. {sorted(names)[0]}; "
                "weights and config.json are of different models"
            )
    return found


def load_component(directory, kind, dtype=np.float32):
    """Returns (module, params, config) of one component folder.

    Args:
      directory: holds config.json and safetensors (one file or shards; float32,
        float16 or bfloat16). kind: of `KINDS`.
      dtype: of the returned parameters and of the module's computation.
    Returns: a Flax module, its parameters (nested dict of NumPy arrays), the config dict.
    Raises: UserError naming the file, for whatever is missing, malformed or unsupported.
    """
    directory = Path(directory)
    config = read_json(directory / "config.json")
    check_config(kind, config, directory / "config.json")
    module = KINDS[kind].build(config, dtype)
    params = {}
    for path, (name, entry) in _entries_by_path(directory, kind, module).items():
        array = _read_tensor(name, entry)
        if path.endswith("/kernel") and array.ndim == 4 and kind == "vae":
            array = _drop_conv_axes(path, array)
        array = _from_torch_layout(path, array)
        params[path] = np.ascontiguousarray(array, dtype).reshape(array.shape)
    return module, unflatten_dict(params, sep="/"), config


def _drop_conv_axes(path, array):
    is_attention = re.search(r"/(query|key|value|proj_attn)/kernel$", path)
    return array[:, :, 0, 0] if is_attention else array


_SUPPORTED = {
    "unet": {
        "norm_num_groups": (32,),
        "norm_eps": (1e-5,),
        "act_fn": ("silu", "swish"),
        "num_attention_heads": (None,),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "addition_embed_type": (None,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "time_cond_proj_dim": (None,),
        "time_embedding_type": ("positional",),
        "time_embedding_dim": (None,),
        "resnet_time_scale_shift": ("default",),
        "dual_cross_attention": (False,),
        "center_input_sample": (False,),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
    },
    "vae": {
        "act_fn": ("silu", "swish"),
        "shift_factor": (None, 0, 0.0),
        "latents_mean": (None,),
        "latents_std": (None,),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
        "mid_block_add_attention": (True,),
    },
}
_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpDecoderBlock2D"),
}


def check_config(kind, config, file):
    """Raises UserError if the config asks for what the Flax module would ignore."""
    for field, allowed in _SUPPORTED.get(kind, {}).items():
        if field in config and config[field] not in allowed:
            raise UserError(
                f"{file}: {field}={config[field]!r} is not supported; "
                f"must be {' or '.join(map(repr, allowed))}"
            )
    if kind not in ("unet", "vae"):
        return
    for field, allowed in _BLOCKS.items():
        unknown = [b for b in config.get(field, ()) if b not in allowed]
        if unknown:
            raise UserError(
                f"{file}: {field} has {unknown[0]!r}; must be of {', '.join(allowed)}"
            )
    groups = config.get("norm_num_groups", 32)
    uneven = [c for c in config.get("block_out_channels", ()) if c % groups]
    if uneven:
        raise UserError(
            f"{file}: block_out_channels has {uneven[0]}; "
            f"must be multiples of norm_num_groups={groups}"
        )


# --- writing --------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_folder(out):
    """Yields a temporary sibling that becomes `out` on success, and is removed if not.

    An existing `out` is replaced whole, never mixed with the new files.
    """
    out = Path(out).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    temp = out.parent / f".{out.name}.tmp-{os.getpid()}"
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir()
    try:
        yield temp
        for file in [p for p in temp.rglob("*") if p.is_file()]:
            with file.open("rb") as f:
                os.fsync(f.fileno())
        old = out.parent / f".{out.name}.old-{os.getpid()}"
        if out.exists():
            out.rename(old)
        temp.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def save_model_folder(directory, config, params, dtype=np.float32):
    """Writes one component (config.json, safetensors) as diffusers reads it, atomically.

    Args: config: as `load_component` returns or the modules are built from.
      params: nested or flat ("a/b") dict of Flax parameters; they tell which kind of
      component it is. dtype: on disk.
    """
    flat = flatten_dict(params, sep="/")
    kind, tensors = _kind_of(flat), {}
    for path, array in flat.items():
        array = to_torch_layout(path, np.asarray(jax.device_get(array)))
        tensors[torch_name(path)] = np.ascontiguousarray(array, dtype).reshape(
            array.shape
        )
    with atomic_folder(directory) as temp:
        text = json.dumps(KINDS[kind].extra_config | config, indent=2, sort_keys=True)
        (temp / "config.json").write_text(text + "\n", encoding="utf-8")
        file = temp / f"{KINDS[kind].stem}.safetensors"
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})


def _kind_of(flat):
    tops = {path.split("/")[0] for path in flat}
    for top, kind in (
        ("vision_model", "clip"),
        ("text_model", "text_encoder"),
        ("decoder", "vae"),
        ("down_blocks_0", "unet"),
    ):
        if top in tops:
            return kind
    raise ValueError(f"parameters of no known component: {sorted(tops)}")


def export(base_dir, changed, out_dir):
    """Writes the base model folder with some UNet tensors replaced, atomically.

    Untouched tensors, the other components and the file layout stay byte for byte.
    Left out, since they would hold the original weights or cannot be checked: pickles,
    single-file checkpoints, and further variants of the UNet.

    Args: base_dir: a diffusers folder. changed: {Flax UNet path "a/b/c": array}; cast
        to the dtype of the file. out_dir: replaced if it exists.
    Raises: UserError for an unknown path, a wrong shape, a value that does not fit.
    """
    base, out = Path(base_dir).absolute(), Path(out_dir).absolute()
    if out == base or base in out.parents or out in base.parents:
        raise UserError(f"{out}: cannot export into the base model {base} itself")
    unet = base / "unet"
    config = read_json(unet / "config.json")
    entries = _entries_by_path(unet, "unet", KINDS["unet"].build(config))
    unknown = sorted(set(changed) - set(entries))
    if unknown:
        raise UserError(f"{base}: its UNet has no parameter {unknown[0]!r}")
    kept = set(weight_files(unet, KINDS["unet"].stem))
    with atomic_folder(out) as temp:
        left_out = _copy_model(base, temp, kept)
        if left_out:
            logging.warning("export leaves out %s", ", ".join(left_out))
        for path, array in changed.items():
            name, entry = entries[path]
            data = _encode(path, name, entry, array)
            with (temp / entry.file.relative_to(base)).open("r+b") as f:
                f.seek(entry.begin)
                f.write(data)


def _encode(path, name, entry, array):
    array = to_torch_layout(path, np.asarray(jax.device_get(array)))
    if array.shape != entry.shape:
        raise UserError(
            f"{path}: has PyTorch shape {list(array.shape)}, the base {name} has "
            f"{list(entry.shape)}"
        )
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(array, _DTYPES[entry.dtype])
    if not np.isfinite(cast.astype(np.float32)).all():
        raise UserError(f"{path}: not finite as {entry.dtype}, the base file's dtype")
    return cast.tobytes()


def _copy_model(base, temp, unet_files):
    """Copies what belongs to the pipeline; returns what was left out."""
    index = read_json(base / "model_index.json")
    components = {k for k, v in index.items() if isinstance(v, list) and any(v)}
    left_out = []
    for source in sorted(p for p in base.rglob("*") if p.is_file()):
        relative = source.relative_to(base)
        top, is_weight = relative.parts[0], source.suffix in _WEIGHTS
        if any(part.startswith(".") for part in relative.parts):
            continue
        at_root = len(relative.parts) == 1
        if not at_root and top not in components:
            skip = True
        elif top == "unet":
            is_index = source.name.endswith(".index.json")
            skip = source not in unet_files and (
                is_weight or (is_index and len(unet_files) == 1)
            )
        else:
            skip = source.suffix in PICKLES or (at_root and is_weight)
        if skip:
            left_out.append(str(relative))
            continue
        target = temp / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return left_out


def content_hash(directory):
    """Returns the sha256, hex, over a folder's weight and config files and their names."""
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
