# SPDX-License-Identifier: Apache-2.0
"""Model folders: diffusers safetensors <-> Flax parameters, export, content hash.

Everything is read and written as safetensors; see `tensors` for names and layouts.
"""

import functools
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import safetensors.numpy
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from gift_jax.models import safetensors_io, sd, vision
from gift_jax.models.ops.activations import ACTIVATIONS
from gift_jax.models.params import parameter_shapes
from gift_jax.models.tokenizer import write_added_tokens
from gift_jax.runtime import files
from gift_jax.runtime.errors import UserError

WEIGHTS = (
    *safetensors_io.PICKLES,
    ".safetensors",
    ".msgpack",
    ".h5",
    ".onnx",
    ".onnx_data",
)
COMPONENTS = ("unet", "vae", "text_encoder")  # whose weights are read
TOKEN_TABLE = "text_model/embeddings/token_embedding/embedding"
_HASHED = (".safetensors", ".json", ".txt")


class Kind(NamedTuple):
    """How one component of a model folder is built, and what its files are called."""

    build: object
    stem: str
    extra_config: dict


KINDS = {
    "unet": Kind(
        sd.build_unet,
        "diffusion_pytorch_model",
        {"_class_name": "UNet2DConditionModel"},
    ),
    "vae": Kind(
        sd.build_vae, "diffusion_pytorch_model", {"_class_name": "AutoencoderKL"}
    ),
    "text_encoder": Kind(
        sd.build_text,
        "model",
        {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"},
    ),
    "clip": Kind(
        vision.build_clip,
        "model",
        {"architectures": ["CLIPModel"], "model_type": "clip"},
    ),
    "vit": Kind(
        vision.build_vit,
        "model",
        {"architectures": ["ViTModel"], "model_type": "vit"},
    ),
    "dinov2": Kind(
        vision.build_dinov2,
        "model",
        {"architectures": ["Dinov2Model"], "model_type": "dinov2"},
    ),
    "resnet_classifier": Kind(
        vision.build_resnet_classifier,
        "model",
        {"architectures": ["ResNetForImageClassification"], "model_type": "resnet"},
    ),
    "vit_classifier": Kind(
        vision.build_vit_classifier,
        "model",
        {"architectures": ["ViTForImageClassification"], "model_type": "vit"},
    ),
}
_UNREAD = {"vit": ("pooler.dense.weight", "pooler.dense.bias")}  # on disk, of no use
_COUNTS = ("position_ids", "num_batches_tracked")  # ends of names, of no use either


# --- loading --------------------------------------------------------------------------


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
    config = safetensors_io.read_json(directory / "config.json")
    shapes = _shapes(kind, json.dumps(config))
    entries = {}
    for file in safetensors_io.weight_files(directory, KINDS[kind].stem, variant):
        header = safetensors_io.read_header(file)
        for name in header.keys() & entries.keys():
            raise UserError(f"{file}: {name} is also in {entries[name].file.name}")
        entries |= header
    entry_of, missing = {}, []
    for path, shape in shapes.items():
        name = safetensors_io.torch_name(path)
        if name not in entries:
            name = safetensors_io.old_name(name)
        if name not in entries:
            missing.append(safetensors_io.torch_name(path))
            continue
        entry, expected = entries[name], safetensors_io.torch_shape(path, shape)
        as_conv = (*expected, 1, 1)  # very old VAEs keep attention as 1x1 convolutions
        if entry.shape not in (expected, as_conv if kind == "vae" else expected):
            raise UserError(
                f"{entry.file}: {name} has shape {list(entry.shape)}, but config.json "
                f"says {list(expected)}; weights and config are of different models"
            )
        entry_of[path] = (name, entry)
    used = {name for name, _ in entry_of.values()} | set(_UNREAD.get(kind, ()))
    extra = [n for n in entries if n not in used and not n.endswith(_COUNTS)]
    for what, names in (("missing", missing), ("unexpected", extra)):
        if names:
            raise UserError(
                f"{directory}: {len(names)} {what} tensors, e.g. {sorted(names)[0]}; "
                "weights and config.json are of different models"
            )
    return entry_of


def load_component(
    directory, kind, dtype=np.float32, *, variant="", only=None, place=np.asarray
):
    """Returns (module, params, config) of one component folder.

    Args:
      directory: holds config.json and safetensors (one file or shards; float32,
        float16 or bfloat16). kind: of `KINDS`.
      dtype: of the returned parameters and of the module's computation.
      variant: which files, see `tensors.weight_files`. only: Flax paths to read, all
        by default. place: called on every array as it is read, e.g. to put it on a
        device before the next one is: one tensor more than the result is in memory.
    Returns: a Flax module, its parameters (nested dict of NumPy arrays, or of what
      `place` returns), the config.
    Raises: UserError naming the file, if one is missing, malformed or unsupported.
    """
    directory = Path(directory)
    config = safetensors_io.read_json(directory / "config.json")
    check_config(kind, config, directory / "config.json")
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
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
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
    "text_encoder": {"hidden_act": tuple(ACTIVATIONS)},
    "resnet_classifier": {
        "num_channels": (3,),
        "layer_type": ("basic", "bottleneck"),
        "downsample_in_bottleneck": (False,),
    },
    "vit_classifier": {"num_channels": (3,)},
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


def save_model_folder(directory, config, params, dtype=np.float32):
    """Writes one component (config.json, safetensors) for diffusers, atomically.

    Args: config: as `load_component` returns or the modules are built from.
      params: nested or flat ("a/b") dict of Flax parameters; they tell which kind of
      component it is. dtype: on disk.
    """
    flat = flatten_dict(params, sep="/")
    kind, by_name = _kind_of(flat), {}
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


def by_component(flat):
    """Returns {"unet": ..., "text_encoder": ...}: a flat dict's two kinds of paths."""
    parts = {"unet": {}, "text_encoder": {}}
    for path, array in flat.items():
        is_text = path.startswith("text_model/")
        parts["text_encoder" if is_text else "unet"][path] = array
    return parts


def export(
    base_dir, changed, out_dir, variant="", dtype=None, tokenizer=None, readme=""
):
    """Writes the base model folder with some tensors replaced, atomically.

    Untouched tensors, the other components and the file layout stay byte for byte, but
    for the dtype that the config of a half-precision text encoder names: float32.
    Left out, since they would hold the original weights or cannot be checked: pickles,
    single-file checkpoints, and further variants of the UNet, or of the text encoder
    where that changed. (A component that has only pickles, as some safety checkers,
    keeps them, unread.)

    Args: base_dir: a diffusers folder. changed: {Flax path "a/b/c" of the UNet or of
        the text encoder: array}; cast to the dtype of the file. The text encoder's
        `TOKEN_TABLE` may have another number of rows; vocab_size follows. out_dir:
        replaced if it exists. variant: which of the base's files the model was read
        from. dtype: name of `tensors.DTYPES` to cast every weight of UNet, VAE and
        text encoder to; None keeps each tensor's own. tokenizer: of transformers, whose
        tokens beyond the base's are added. readme: README.md, in place of the base's.
    Raises: UserError for an unknown path, a wrong shape, a value that does not fit.
    """
    base, out = Path(base_dir).absolute(), Path(out_dir).absolute()
    if out == base or base in out.parents or out in base.parents:
        raise UserError(f"{out}: cannot export into the base model {base} itself")
    entries, kept = {}, {}
    for kind, arrays in by_component(changed).items():
        if kind != "unet" and not arrays:
            continue
        entry_of = entries_by_path(base / kind, kind, variant)
        unknown = sorted(set(arrays) - set(entry_of))
        if unknown:
            label = {"unet": "UNet", "text_encoder": "text encoder"}[kind]
            raise UserError(f"{base}: its {label} has no parameter {unknown[0]!r}")
        entries |= entry_of
        kept[kind] = set(
            safetensors_io.weight_files(base / kind, KINDS[kind].stem, variant)
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
            write_added_tokens(tokenizer, temp / "tokenizer")
        if readme:
            (temp / "README.md").write_text(readme, encoding="utf-8")
        if dtype is not None:
            for component in COMPONENTS:
                for file in sorted((temp / component).glob("*.safetensors")):
                    _recast_file(file, dtype)
        for file in sorted(temp.glob("*/config.json")):
            _load_as_float32(file)


def _load_as_float32(file):
    """Has transformers 5 load half-precision weights as diffusers does: in float32.

    Its default is the config's dtype, else the stored one; a text encoder of another
    dtype than the UNet stops diffusers' pipelines. An explicit dtype still decides.
    """
    config = safetensors_io.read_json(file)
    if "model_type" not in config:  # a component of diffusers
        return
    key = "dtype" if "dtype" in config else "torch_dtype"
    dtype = config.get(key) or _stored_dtype(file.parent)
    if dtype not in ("float32", ""):
        text = json.dumps(config | {key: "float32"}, indent=2)
        file.write_text(text + "\n", encoding="utf-8")


def _stored_dtype(directory):
    """Returns "half" if a tensor is in 16 bits, else ""."""
    for file in directory.glob("*.safetensors"):
        entries = safetensors_io.read_header(file).values()
        if any(entry.dtype in ("F16", "BF16") for entry in entries):
            return "half"
    return ""


def _resized_table(changed, entries):
    """Returns (TOKEN_TABLE,) if it changed its number of rows, else ()."""
    if TOKEN_TABLE not in changed:
        return ()
    old, new = entries[TOKEN_TABLE][1].shape, changed[TOKEN_TABLE].shape
    return (TOKEN_TABLE,) if new != old and new[1:] == old[1:] else ()


def _resize(file, name, table):
    """Puts a token table of another number of rows into a text encoder's file."""

    def replace(key, entry):
        if key != name:
            return _as_it_is(key, entry)
        array = cast(name, np.asarray(jax.device_get(table)), entry.dtype)
        return entry.dtype, array.shape, lambda: array

    _rewrite_file(file, replace)
    config = safetensors_io.read_json(file.parent / "config.json")
    text = json.dumps(config | {"vocab_size": len(table)}, indent=2, sort_keys=True)
    (file.parent / "config.json").write_text(text + "\n", encoding="utf-8")


def _encode(path, name, entry, array):
    array = safetensors_io.to_torch_layout(path, np.asarray(jax.device_get(array)))
    if array.shape != entry.shape:
        raise UserError(
            f"{path}: has PyTorch shape {list(array.shape)}, the base {name} has "
            f"{list(entry.shape)}"
        )
    return cast(name, array, entry.dtype).tobytes()


def cast(name, array, dtype):
    """Returns the array as a dtype of `tensors.DTYPES`, or as it is if not a float.

    Raises: UserError if a finite value becomes infinite.
    """
    disk_dtype = np.dtype(safetensors_io.DTYPES[dtype])
    if array.dtype == disk_dtype or array.dtype not in map(
        np.dtype, safetensors_io.DTYPES.values()
    ):
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore"):
        result = np.ascontiguousarray(array, disk_dtype)
    if not np.isfinite(result.astype(np.float32)).all():
        raise UserError(
            f"{name}: not finite as {dtype}; keep it in a wider dtype (F32 or BF16)"
        )
    return result


def _recast_file(file, dtype):
    def recast(name, entry):
        known, shape, read = _as_it_is(name, entry)
        if known in safetensors_io.DTYPES:
            known = dtype
        return known, shape, lambda: cast(name, read(), dtype)

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


def _is_left_out(source, relative, kept):
    top, is_weight = relative.parts[0], source.suffix in WEIGHTS
    if len(relative.parts) == 1:
        return is_weight
    if top in kept:
        if re.search(r"\.index(\.\w+)?\.json$", source.name):
            return not set(safetensors_io.shards(source)) <= kept[top]
        return is_weight and source not in kept[top]
    if source.suffix not in safetensors_io.PICKLES:
        return False
    return top in COMPONENTS or any(source.parent.glob("*.safetensors"))


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
