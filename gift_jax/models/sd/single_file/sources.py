# SPDX-License-Identifier: Apache-2.0
"""What a single file lacks, from other folders: the tokenizer, and maybe a VAE."""

import json
import shutil
from pathlib import Path

from gift_jax.models import hub, safetensors_io, weight_files
from gift_jax.models.sd import architectures
from gift_jax.models.sd.single_file.families import Family
from gift_jax.models.tokenizer import load_tokenizer
from gift_jax.runtime.errors import UserError, one_line, shown

TOKENIZERS = {  # whose tokenizer/ has the vocabulary of CLIP, which all families have
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
_STEM = "diffusion_pytorch_model"
_SCALE = 0.18215  # scaling_factor of a VAE whose config names none


def tokenizer_folder(name: str, file: Path, family: Family, rows: int) -> Path:
    """Returns the folder of a tokenizer with as many words as a file has vectors for.

    Args: name: a model's folder or hub id, or the folder itself; "": of `TOKENIZERS`.
      rows: of the file's token table.
    """
    folder = Path(name).expanduser()
    if not name or not folder.exists():
        name = name or TOKENIZERS[family.name]
        try:
            folder = hub.fetch(name, wanted=("tokenizer/*",), field="--tokenizer")
        except UserError as error:
            raise UserError(
                f"{error}. A single file holds no tokenizer: name the folder of a "
                "model with CLIP's to gift-jax convert from-single-file, by --tokenizer"
            ) from None
    inner = folder / "tokenizer"
    folder = inner if inner.is_dir() else folder
    words = len(load_tokenizer(folder))
    if words != rows:
        raise UserError(
            f"--tokenizer={one_line(folder)}: has {words} words, but "
            f"{one_line(file)} has vectors for {rows}; name another"
        )
    return folder


def write_tokenizer(source: Path, directory: Path, pad_token: str) -> None:
    """Copies a tokenizer, with another token to pad with."""
    directory.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "added_tokens.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, directory / name)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (source / name).exists():
            content = safetensors_io.read_json(source / name)
            content.pop("name_or_path", None)
            write_json(directory / name, content | {"pad_token": pad_token})


def vae_folder(name: str) -> Path:
    """Returns a VAE's folder, given it, a model's folder, or a hub id of either."""
    folder = Path(name).expanduser()
    if not folder.exists():
        if not hub.is_id(name):
            raise UserError(
                f"--vae={shown(name)}: no such folder; must be the folder of a model "
                "or of a VAE, or a hub id"
            )
        wanted = ("config.json", f"{_STEM}*", "vae/*.json", "vae/*.safetensors")
        folder = hub.fetch(name, wanted=wanted, field="--vae")
    return folder / "vae" if (folder / "vae").is_dir() else folder


def check_vae(folder: Path, family: Family, channels: int) -> None:
    """Raises UserError for a VAE that is none, damaged, or another family's.

    Args: channels: of the latents.
    """
    config = safetensors_io.read_json(folder / "config.json")
    expected = architectures.MODELS[family.name]["vae"]
    for key, default, needed in (
        ("_class_name", None, "AutoencoderKL"),
        ("scaling_factor", _SCALE, expected.get("scaling_factor", _SCALE)),
        ("latent_channels", 4, channels),
    ):
        if config.get(key, default) != needed:
            raise UserError(
                f"--vae={one_line(folder)}: {key}={shown(config.get(key, default))} in "
                f"its config.json; must be {needed!r}, as a VAE of "
                f"{family.label} has it; name another"
            )
    for part in weight_files.weight_files(folder, _STEM):
        safetensors_io.read_header(part)


def copy_vae(folder: Path, directory: Path) -> None:
    """Copies a VAE's files as they are."""
    directory.mkdir()
    parts = weight_files.weight_files(folder, _STEM)
    indices = folder.glob(f"{_STEM}.safetensors.index*.json")
    for source in (folder / "config.json", *parts, *indices):
        shutil.copyfile(source, directory / source.name)


def write_json(file: Path, value: object) -> None:
    """Writes a JSON file of a model folder."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
