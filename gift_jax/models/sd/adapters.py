# SPDX-License-Identifier: Apache-2.0
"""Files from elsewhere that change a model: LoRA, textual inversion, UNet tensors.

Their tensors are merged into the weights as these are read; the folder stays as it is.
Every tensor of a file is used, or the file is refused.
"""

import dataclasses
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gift_jax.models import safetensors_io, weights
from gift_jax.models.sd import lora_files
from gift_jax.models.tokenizer import load_tokenizer, vector_names
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError, one_line, shown

_EMBEDDINGS = "learned_embeds.safetensors"
_UNNAMED = "emb_params"  # the one tensor of a file that AUTOMATIC1111's UI writes


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """The fields that name files to add to a model, in the order of adding."""

    unet_tensors: tuple[str, ...] = config.value(
        (), "FILE: safetensors by diffusers' names, in place of the UNet's"
    )
    lora: tuple[str, ...] = config.value(
        (), "FILE or FILE:SCALE: LoRA by the names of diffusers, peft or kohya"
    )
    textual_inversion: tuple[str, ...] = config.value(
        (), "FILE or FILE:TOKEN: learned embeddings, as diffusers has them"
    )

    def __bool__(self) -> bool:
        return bool(self.unet_tensors or self.lora or self.textual_inversion)


@dataclasses.dataclass(frozen=True)
class _Source:
    """One file. kind: in words. detail: its scale or its token, in words."""

    kind: str
    file: Path
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Adapters:
    """What files change of one model folder.

    Attributes: sources: the files. changes: {Flax path of the UNet or the text
      encoder: functions of the float32 tensor, as PyTorch lays it out, to apply one
      after the other}. words: {token: float32 "N D"}, new to the tokenizer, of
      `vocabulary` tokens.
    """

    sources: tuple[_Source, ...] = ()
    changes: Mapping[str, Sequence[lora_files.Change]] = dataclasses.field(
        default_factory=dict
    )
    words: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    vocabulary: int = 0

    def paths(self, component: str) -> list[str]:
        """Returns the Flax paths of a component's parameters that are changed."""
        table = {weights.TOKEN_TABLE: None} if self.words else {}
        parts = weights.by_component({**self.changes, **table})
        return list(parts.get(component, ()))

    def apply(self, path: str, array: np.ndarray) -> np.ndarray:
        """Returns a parameter as changed; array: float32, Flax layout.

        Raises: UserError if it is not finite.
        """
        if path == weights.TOKEN_TABLE and self.words:
            array = np.concatenate([array[: self.vocabulary], *self.words.values()])
        if path in self.changes:
            W = safetensors_io.to_torch_layout(path, array)
            for change in self.changes[path]:
                W = change(W)
            array = np.ascontiguousarray(safetensors_io.from_torch_layout(path, W))
        if not np.isfinite(array).all():
            files = ", ".join(one_line(source.file) for source in self.sources)
            raise UserError(
                f"{safetensors_io.torch_name(path)} is not finite with {files}; copy "
                "the file again"
            )
        return array

    def add_words(self, tokenizer) -> None:
        """Adds the tokens to the folder's tokenizer, in place."""
        for token, rows in self.words.items():
            tokenizer.add_tokens(vector_names(token, len(rows)))

    def content_hash(self, base: str) -> str:
        """Returns the sha256, hex, of these files and of what they change.

        Args: base: the content hash of the folder; returned as it is without files.
        """
        if not self.sources:
            return base
        parts = [
            base,
            *(f"{s.kind} {s.detail} {_sha256(s.file)}" for s in self.sources),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def descriptions(self) -> tuple[str, ...]:
        """Returns what a model card says of each file."""
        return tuple(
            f"the {s.kind} `{s.file.name}`{s.detail and f', {s.detail}'} (sha256 "
            f"`{_sha256(s.file)}`)"
            for s in self.sources
        )


def read_adapters(fields: AdapterFiles, root: Path, variant: str = "") -> Adapters:
    """Returns what files change of a diffusers folder; reads their headers.

    Raises: UserError of one line naming the file, and its first tensor that does not
      fit this model.
    """
    targets = _targets(root, variant)
    sources: list[_Source] = []
    changes: dict[str, list[lora_files.Change]] = {}
    for text in fields.unet_tensors:
        file = _file("unet_tensors", text)
        sources.append(_Source("UNet tensors", file))
        for path, change in _read_unet(file, targets["unet"]).items():
            if path in changes:
                raise UserError(
                    f"{one_line(file)}: {safetensors_io.torch_name(path)} is in "
                    "another file of unet_tensors too; leave one of them out"
                )
            changes[path] = [change]
    for text in fields.lora:
        name, scale = _split_scale(text)
        file = _file("lora", name)
        sources.append(_Source("LoRA", file, f"scale {scale:g}"))
        for path, change in lora_files.read(file, targets, scale).items():
            changes.setdefault(path, []).append(change)
    words, vocabulary = {}, 0
    if fields.textual_inversion:
        tokenizer = load_tokenizer(root / "tokenizer")
        vocabulary = len(tokenizer)
        rows, width = targets["text_encoder"][_torch_table()][1]
        if rows < vocabulary:
            raise UserError(
                f"{root}: the tokenizer has {vocabulary} tokens, but the text encoder "
                f"{rows} rows; they are of different models"
            )
    for text in fields.textual_inversion:
        name, token = _split_token(text)
        file = _file("textual_inversion", name, _EMBEDDINGS)
        token, vectors = _read_embeddings(file, token, width)
        _add_word(tokenizer, file, token, len(vectors))
        sources.append(_Source("textual inversion", file, f"token {token}"))
        words[token] = vectors
    return Adapters(tuple(sources), changes, words, vocabulary)


def read_lora(name: str, root: Path, variant: str = "") -> list[lora_files.Layer]:
    """Returns the updates of one LoRA file for a diffusers folder.

    Raises: see `read_adapters`.
    """
    return lora_files.read_layers(_file("lora", name), _targets(root, variant))


def _targets(root: Path, variant: str) -> lora_files.Targets:
    """Returns the tensors of a folder's components that files can change."""
    return {
        component: {
            safetensors_io.torch_name(path): (path, entry.shape)
            for path, (_, entry) in weights.entries_by_path(
                root / component, component, variant
            ).items()
        }
        for component in weights.COMPONENTS
        if component != "vae"
        if component != "text_encoder_2" or (root / component).is_dir()  # SDXL's
    }


def _torch_table() -> str:
    return safetensors_io.torch_name(weights.TOKEN_TABLE)


# --- what a field names ---------------------------------------------------------------


def _file(field: str, name: str, in_folder: str = "") -> Path:
    """Returns the file that a field names.

    Args: in_folder: the name of such a file where a folder is named.
    """
    path = Path(os.path.expanduser(name))
    if in_folder and os.path.isdir(path):
        path = path / in_folder
    if field == "lora":
        path = lora_files.find(path)
    if path.suffix in safetensors_io.PICKLES:
        raise UserError(
            f"{field}={shown(name)} is a pickle, which can run code and is never "
            "loaded; save it as safetensors"
        )
    if not os.path.isfile(path):  # unlike pathlib's, of any name
        names = " or ".join(lora_files.NAMES) if field == "lora" else in_folder
        folder = f", or a folder with {names}" if names else ""
        raise UserError(
            f"{field}={shown(name)}: no such file; must be a safetensors file{folder}"
        )
    return path


def _split_scale(text: str) -> tuple[str, float]:
    """Returns (file, scale) of FILE or FILE:SCALE."""
    name, colon, tail = text.rpartition(":")
    if not colon or os.path.exists(os.path.expanduser(text)):
        return text, 1.0
    try:
        scale = float(tail)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise UserError(
            f"lora={shown(text)}: {shown(tail)} is no scale; must be FILE or "
            "FILE:NUMBER, such as style.safetensors:0.8"
        )
    return name, scale


def _split_token(text: str) -> tuple[str, str]:
    """Returns (file, token) of FILE or FILE:TOKEN; token: "" if it is not given."""
    if os.path.exists(os.path.expanduser(text)):
        return text, ""
    name, colon, token = text.partition(".safetensors:")
    return (f"{name}.safetensors", token) if colon else (text, "")


# --- the files ------------------------------------------------------------------------


def _read_unet(file: Path, targets) -> dict[str, lora_files.Change]:
    """Returns {Flax path: its tensor in place of the model's}."""
    entries, changes, reasons = safetensors_io.read_header(file), {}, {}
    for name in sorted(entries):
        entry, plain = entries[name], name.removeprefix("unet.")
        path, shape = targets.get(plain, ("", ()))
        if not path:
            reasons[name] = "is no tensor of this model's UNet by diffusers' names"
        elif entry.shape != shape:
            reasons[name] = f"has shape {list(entry.shape)}, the model's {list(shape)}"
        elif path in changes:
            reasons[name] = "is there twice, with and without unet. before it"
        else:
            changes[path] = _replace(name, entry)
    lora_files.refuse_misfits(file, reasons, len(entries))
    return changes


def _replace(name, entry) -> lora_files.Change:
    return lambda _: np.asarray(safetensors_io.read_tensor(name, entry), np.float32)


def _read_embeddings(file: Path, token: str, width: int) -> tuple[str, np.ndarray]:
    """Returns (token, float32 "N D") of a file with one tensor, "D" or "N D".

    Source: diffusers `TextualInversionLoaderMixin`.
    """
    entries = safetensors_io.read_header(file)
    if len(entries) != 1:
        raise UserError(
            f"{one_line(file)}: has {len(entries)} tensors; a textual inversion has "
            "one, named by its token"
        )
    ((name, entry),) = entries.items()
    if name.endswith((".weight", ".bias")):
        raise UserError(
            f"{one_line(file)}: {one_line(name)} is no token, but a tensor of a "
            "network; a textual inversion has one tensor, named by its token"
        )
    if not token and name == _UNNAMED:
        raise UserError(
            f"{one_line(file)}: names no token; give one, as FILE:TOKEN, such as "
            f"{one_line(file.name)}:<thing>"
        )
    if len(entry.shape) not in (1, 2) or entry.shape[-1] != width or 0 in entry.shape:
        raise UserError(
            f"{one_line(file)}: {one_line(name)} has shape {list(entry.shape)}, but "
            f"this model's embeddings are {width} wide; it is of another model"
        )
    vectors = np.asarray(safetensors_io.read_tensor(name, entry), np.float32)
    return token or name, vectors.reshape(-1, width)


def _add_word(tokenizer: Any, file: Path, token: str, vectors: int) -> None:
    """Adds a token's names to a tokenizer, as diffusers does.

    Raises: UserError for one that is in its vocabulary, or that it, or today's
      diffusers, would not keep whole.
    """
    names, vocabulary = vector_names(token, vectors), tokenizer.get_vocab()
    at, fix = f"{one_line(file)}: its token {shown(token)}", "name another: FILE:TOKEN"
    for name in (*names, f"{token}_1"):
        if name in vocabulary:
            raise UserError(
                f"{at} is in the model's vocabulary already ({one_line(name)}); {fix}"
            )
    if not token or token != "".join(token.split()):
        raise UserError(f"{at} must be one word; {fix}")
    if vectors > 1 and token != token.lower():
        raise UserError(
            f"{at} has capitals, of which diffusers reads the first of {vectors} "
            f"vectors only; {fix}"
        )
    ids = list(range(len(tokenizer), len(tokenizer) + vectors))
    tokenizer.add_tokens(names)
    text = f"a {' '.join(names)} b"
    if tokenizer(text, add_special_tokens=False)["input_ids"][1:-1] != ids:
        raise UserError(f"{at} is cut by the model's tokenizer; {fix}")


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
