# SPDX-License-Identifier: Apache-2.0
"""Files from elsewhere that change a model: LoRA, textual inversion, denoiser tensors.

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
from gift_jax.models.kinds import kind_of
from gift_jax.models.sd import lora_files
from gift_jax.models.tokenizer import load_tokenizer, vector_names
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError, one_line, shown

_EMBEDDINGS = "learned_embeds.safetensors"
SDXL_NAMES = ("clip_l", "clip_g")  # of each text encoder's embeddings, in a file
_UNNAMED = "emb_params"  # the one tensor of a file that AUTOMATIC1111's UI writes


@dataclasses.dataclass(frozen=True)
class AdapterFiles:
    """The fields that name files to add to a model, in the order of adding."""

    unet_tensors: tuple[str, ...] = config.value(
        (), "FILE: safetensors by diffusers' names, in place of the denoiser's"
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

    Attributes: sources: the files. changes: {Flax path, see `weights.joined_path`:
      functions of the float32 tensor, as PyTorch lays it out, to apply one after the
      other}. words: {token: {path of a token table: float32 "N D"}}, new to the
      tokenizer, of `vocabulary` tokens.
    """

    sources: tuple[_Source, ...] = ()
    changes: Mapping[str, Sequence[lora_files.Change]] = dataclasses.field(
        default_factory=dict
    )
    words: Mapping[str, Mapping[str, np.ndarray]] = dataclasses.field(
        default_factory=dict
    )
    vocabulary: int = 0

    def paths(self, component: str) -> list[str]:
        """Returns the Flax paths of a component's parameters that are changed."""
        tables = {path: None for rows in self.words.values() for path in rows}
        network, text = weights.network_and_text({**self.changes, **tables})
        if component in weights.DENOISERS:
            return list(network)
        return list(text.get(component, ()))

    def apply(self, path: str, array: np.ndarray) -> np.ndarray:
        """Returns a parameter as changed; array: float32, Flax layout.

        Raises: UserError if it is not finite.
        """
        rows = [rows[path] for rows in self.words.values() if path in rows]
        if rows:
            array = np.concatenate([array[: self.vocabulary], *rows])
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
            count = len(next(iter(rows.values())))
            tokenizer.add_tokens(vector_names(token, count))

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
    targets, denoiser = _targets(root, variant), weights.denoiser_of(root)
    label = weights.DENOISERS[denoiser]
    sources: list[_Source] = []
    changes: dict[str, list[lora_files.Change]] = {}
    for text in fields.unet_tensors:
        file = _file("unet_tensors", text)
        sources.append(_Source(f"{label} tensors", file))
        for path, change in _read_denoiser(file, targets[denoiser], denoiser).items():
            if path in changes:
                raise UserError(
                    f"{one_line(file)}: {safetensors_io.torch_name(path)} is in "
                    "another file of unet_tensors too; leave one of them out"
                )
            changes[path] = [change]
    for file, scale in loras(fields):
        sources.append(_Source("LoRA", file, f"scale {scale:g}"))
        for path, change in lora_files.read(file, targets, scale).items():
            changes.setdefault(path, []).append(change)
    words, vocabulary = {}, 0
    if fields.textual_inversion:
        tokenizer = load_tokenizer(root / "tokenizer")
        vocabulary = len(tokenizer)
        tables = {
            path: shape
            for component in targets
            if component != denoiser
            for path, shape in (targets[component][_torch_table()],)
        }
        for rows, _ in tables.values():
            if rows < vocabulary:
                raise UserError(
                    f"{root}: the tokenizer has {vocabulary} tokens, but the text "
                    f"encoder {rows} rows; they are of different models"
                )
    for file, token in embeddings(fields):
        widths = {path: width for path, (_, width) in tables.items()}
        token, vectors = _read_embeddings(file, token, widths)
        _add_word(tokenizer, file, token, len(next(iter(vectors.values()))))
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
            safetensors_io.torch_name(path): (
                weights.joined_path(component, path),
                entry.shape,
            )
            for path, (_, entry) in weights.entries_by_path(
                root / component, kind_of(root, component), variant
            ).items()
        }
        for component in weights.components(root)
        if component != "vae"
    }


def _torch_table() -> str:
    return safetensors_io.torch_name(weights.TOKEN_TABLE)


# --- what a field names ---------------------------------------------------------------


def loras(fields: AdapterFiles) -> list[tuple[Path, float]]:
    """Returns (file, scale) of each LoRA; UserError for a file that is not there."""
    named = map(_split_scale, fields.lora)
    return [(_file("lora", name), scale) for name, scale in named]


def embeddings(fields: AdapterFiles) -> list[tuple[Path, str]]:
    """Returns (file, token or "") of each textual inversion, see `loras`."""
    named = map(_split_token, fields.textual_inversion)
    return [
        (_file("textual_inversion", name, _EMBEDDINGS), token) for name, token in named
    ]


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


def _read_denoiser(file: Path, targets, denoiser: str) -> dict[str, lora_files.Change]:
    """Returns {Flax path: its tensor in place of the model's}."""
    entries, changes, reasons = safetensors_io.read_header(file), {}, {}
    label = weights.DENOISERS[denoiser]
    for name in sorted(entries):
        entry, plain = entries[name], name.removeprefix(f"{denoiser}.")
        path, shape = targets.get(plain, ("", ()))
        if not path:
            reasons[name] = f"is no tensor of this model's {label} by diffusers' names"
        elif entry.shape != shape:
            reasons[name] = f"has shape {list(entry.shape)}, the model's {list(shape)}"
        elif path in changes:
            reasons[name] = f"is there twice, with and without {denoiser}. before it"
        else:
            changes[path] = _replace(name, entry)
    lora_files.refuse_misfits(file, reasons, len(entries))
    return changes


def _replace(name, entry) -> lora_files.Change:
    return lambda _: np.asarray(safetensors_io.read_tensor(name, entry), np.float32)


def _read_embeddings(
    file: Path, token: str, widths: Mapping[str, int]
) -> tuple[str, dict[str, np.ndarray]]:
    """Returns (token, {path of a token table: float32 "N D"}) of a file.

    It has one tensor, "D" or "N D", named by the token; for a model of two text
    encoders two, clip_l and clip_g.

    Args: widths: {path of a token table: D}.
    Source: diffusers `TextualInversionLoaderMixin`; for SDXL
      examples/advanced_diffusion_training/train_dreambooth_lora_sdxl_advanced.py.
    """
    entries, at = safetensors_io.read_header(file), one_line(file)
    if len(widths) > 1:
        names = SDXL_NAMES
        if entries.keys() != set(names):
            raise UserError(
                f"{at}: has the tensors {', '.join(map(one_line, sorted(entries)))}; a "
                f"textual inversion of this model has {' and '.join(names)}"
            )
        token = token or f"<{file.stem}>"
    elif entries.keys() == set(SDXL_NAMES):
        raise UserError(f"{at}: is of an SDXL, and this model has one text encoder")
    elif len(entries) != 1:
        raise UserError(
            f"{at}: has {len(entries)} tensors; a textual inversion has one, named by "
            "its token"
        )
    else:
        names = tuple(entries)
    if names[0].endswith((".weight", ".bias")):
        raise UserError(
            f"{at}: {one_line(names[0])} is no token, but a tensor of a network; a "
            "textual inversion has one tensor, named by its token"
        )
    if not token and names[0] == _UNNAMED:
        raise UserError(
            f"{at}: names no token; give one, as FILE:TOKEN, such as "
            f"{one_line(file.name)}:<thing>"
        )
    vectors = {}
    for name, (path, width) in zip(names, widths.items(), strict=True):
        shape = entries[name].shape
        if len(shape) not in (1, 2) or shape[-1] != width or 0 in shape:
            raise UserError(
                f"{at}: {one_line(name)} has shape {list(shape)}, but this model's "
                f"embeddings are {width} wide; it is of another model"
            )
        array = np.asarray(safetensors_io.read_tensor(name, entries[name]), np.float32)
        vectors[path] = array.reshape(-1, width)
    if len({len(rows) for rows in vectors.values()}) > 1:
        raise UserError(f"{at}: its tensors have different numbers of vectors")
    return token or names[0], vectors


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
