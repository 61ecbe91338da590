# SPDX-License-Identifier: Apache-2.0
"""Writes a Stable Diffusion of a published shape with random weights; no download.

    python -m gift_jax.models.sd.random_weights --out runs/sd15 --model sd15

For measuring load time, memory and speed: what it draws is noise. The folder has what
the published ones have (configs, safetensors, old names in the VAE, position ids in the
text encoder), but for the tokenizer's words, which are placeholders (any text becomes
tokens, more of them), and the safety checker. Weights depend on --seed and the
tensor's name alone, never on --dtype or --shard_mib. Needs 4.3 GB of disk for SD 1.5,
5.2 GB for SD 2.1 and 13.9 GB for SDXL in float32, half of it in float16, and 1 GB of
memory.
"""

import functools
import json
import math
import pathlib
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from gift_jax.models import safetensors_io, weights
from gift_jax.models.kinds import KINDS
from gift_jax.models.params import parameter_shapes
from gift_jax.models.sd import architectures
from gift_jax.runtime import cli, files
from gift_jax.runtime.errors import UserError, at_least, choice

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# --- random tensors -------------------------------------------------------------------


class RandomTensor(NamedTuple):
    """One tensor to draw: its shape in PyTorch's layout, its scale and its mean."""

    shape: tuple
    scale: float
    mean: float


def random_tensors(kind: str, model_config: dict) -> dict[str, RandomTensor]:
    """Returns the tensors of a component, by the names that published files have.

    Kernels have variance 1 / fan in, so that activations keep their size; no norm's
    scale is 1 and no bias is 0.

    Args: kind: of `KINDS`. model_config: its config.json.
    """
    module = KINDS[kind].build(model_config)
    tensors = {}
    for path, leaf in flatten_dict(parameter_shapes(module), sep="/").items():
        name = safetensors_io.torch_name(path)
        shape = safetensors_io.torch_shape(path, leaf.shape)
        if kind == "vae":
            name = safetensors_io.old_name(name)
        if path.endswith("/kernel"):
            tensors[name] = RandomTensor(
                shape, 1 / math.sqrt(math.prod(shape[1:])), 0.0
            )
        elif path.endswith("/embedding"):
            tensors[name] = RandomTensor(shape, 0.5, 0.0)
        else:
            tensors[name] = RandomTensor(shape, 0.2, float(path.endswith("/scale")))
    return dict(sorted(tensors.items()))


def draw(name: str, tensor: RandomTensor, dtype: str, seed: int) -> np.ndarray:
    """Returns one tensor, drawn in float32 and rounded to `dtype` of DTYPES."""
    bits = np.random.SFC64([seed, zlib.crc32(name.encode())])
    array = np.random.Generator(bits).standard_normal(tensor.shape, np.float32)
    array *= np.float32(tensor.scale)
    array += np.float32(tensor.mean)
    return array.astype(safetensors_io.DTYPES[DTYPES[dtype]], copy=False)


# --- writing --------------------------------------------------------------------------


def write(out, configs: dict, dtype: str = "float32", seed: int = 0, shard_mib=0):
    """Writes a whole model folder, one tensor in memory at a time.

    Args: out: must not exist. configs: one of `architectures.MODELS`, or one like it.
      dtype: on disk, of DTYPES. shard_mib: divide each component's weights into files
      of about this size, with an index; 0: one file.
    Returns: the folder.
    Raises: UserError if `out` exists or dtype is unknown.
    """
    out = pathlib.Path(out)
    choice("--dtype", dtype, tuple(DTYPES))
    at_least("--shard_mib", shard_mib, 0)
    if out.exists():
        raise UserError(f"--out={out} exists; name a new folder")
    scheduler, is_xl = configs["scheduler"]["_class_name"], "text_encoder_2" in configs
    index = architectures.model_index(scheduler)
    if is_xl:
        index = architectures.xl_model_index(scheduler)
    with files.atomic_folder(out) as temp:
        for kind in weights.COMPONENTS:
            if kind in configs:
                args = configs[kind], dtype, seed, shard_mib
                write_component(temp / kind, kind, *args)
        text = configs["text_encoder"]
        size, length = text["vocab_size"], text["max_position_embeddings"]
        for number in ("", "_2") if is_xl else ("",):
            pad = configs[f"pad_token{number}"]
            write_tokenizer(temp / f"tokenizer{number}", size, length, pad)
        write_json(temp / "scheduler" / "scheduler_config.json", configs["scheduler"])
        write_json(temp / "model_index.json", index)
    return out


def write_component(
    directory, kind, model_config, dtype="float32", seed=0, shard_mib=0
):
    """Writes one component's config.json and safetensors; see `write`."""
    tensors, stem = random_tensors(kind, model_config), KINDS[kind].stem
    write_json(directory / "config.json", model_config)
    shards = list(_shards(tensors, dtype, shard_mib * 2**20))
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        n = len(shards)
        names = [f"{stem}-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
        owner = {name: f for f, s in zip(names, shards, strict=True) for name in s}
        total = sum(_size(tensor, dtype) for tensor in tensors.values())
        text = {"metadata": {"total_size": total}, "weight_map": owner}
        write_json(directory / f"{stem}.safetensors.index.json", text)
    length = model_config.get("max_position_embeddings")
    for i, (file, shard) in enumerate(zip(names, shards, strict=True)):
        is_text = kind in weights.TEXT_ENCODERS
        position_ids = length if is_text and i == 0 else None
        _write_safetensors(directory / file, shard, dtype, seed, position_ids)


def _size(tensor: RandomTensor, dtype: str) -> int:
    return (
        math.prod(tensor.shape)
        * np.dtype(safetensors_io.DTYPES[DTYPES[dtype]]).itemsize
    )


def _shards(tensors: dict, dtype: str, limit: int) -> Iterator[dict]:
    shard, size = {}, 0
    for name, tensor in tensors.items():
        if limit and shard and size + _size(tensor, dtype) > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += _size(tensor, dtype)
    yield shard


def _write_safetensors(file, tensors, dtype, seed, position_ids):
    """Writes random tensors; position_ids: their number, or None for none."""
    entries = {}
    if position_ids:
        ids = np.arange(position_ids)[None]
        entries["text_model.embeddings.position_ids"] = ("I64", ids.shape, lambda: ids)
    for name, tensor in tensors.items():
        read = functools.partial(draw, name, tensor, dtype, seed)
        entries[name] = (DTYPES[dtype], tensor.shape, read)
    safetensors_io.write_file(file, entries, {"format": "pt"})


def _byte_characters() -> list[str]:
    """Returns the character that stands for each byte in the vocabulary, in its order.

    Source: GPT-2's `bytes_to_unicode`, which CLIP's tokenizer uses.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    count = 256 - len(printable)
    return [chr(n) for n in [*printable, *range(256, 256 + count)]]


def write_tokenizer(directory, size=514, max_length=77, pad_token=architectures.END):
    """Writes a CLIP tokenizer of `size` entries that knows every byte and no merge.

    The bytes, the two marks (last) and "!" (0) have the published ids; between lie
    placeholders that no text becomes.
    """
    characters = _byte_characters()
    words = characters + [c + "</w>" for c in characters]
    words += [f"<|placeholder {i}|>" for i in range(len(words), size - 2)]
    words += [architectures.START, architectures.END]
    write_json(directory / "vocab.json", {word: i for i, word in enumerate(words)})
    (directory / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_length,
        "pad_token": architectures.END,  # SD 2.1 too, and otherwise in the next file
    }
    marks = {
        "bos_token": architectures.START,
        "eos_token": architectures.END,
        "unk_token": architectures.END,
    }
    write_json(directory / "tokenizer_config.json", settings)
    write_json(directory / "special_tokens_map.json", marks | {"pad_token": pad_token})


def _byte_characters() -> list[str]:
    """Returns the 256 characters that stand for bytes in CLIP's byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(68)]


def write_json(path, value):
    """Writes a JSON file, and the folders that it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    flags = cli.parser(__doc__, "models.sd.random_weights")
    flags.add_argument("--out", required=True, help="a new folder")
    flags.add_argument("--model", default="sd15", choices=tuple(architectures.MODELS))
    flags.add_argument("--dtype", default="float16", choices=tuple(DTYPES))
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--shard_mib", type=int, default=0, help="0: one file each")
    args = flags.parse_args(argv)
    at_least("--seed", args.seed, 0)
    out = write(
        args.out,
        architectures.MODELS[args.model],
        args.dtype,
        args.seed,
        args.shard_mib,
    )
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(json.dumps({"folder": str(out), "GB": round(size / 1e9, 3)}))
    return 0


if __name__ == "__main__":
    cli.run_main(main)
