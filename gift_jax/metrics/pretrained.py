# SPDX-License-Identifier: Apache-2.0
"""Folders of pretrained models to measure with: located or fetched, and complete."""

import os
from pathlib import Path
from typing import NamedTuple

from gift_jax.metrics.base import UnavailableError
from gift_jax.models import hub, safetensors_io, weight_files
from gift_jax.runtime.errors import UserError, choice

_WEIGHTS = (  # patterns of what the hub is asked for
    ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
)
_ACTIVATIONS = (  # that Flax computes as PyTorch does
    ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish")
)


class Requirements(NamedTuple):
    """What a model's folder must hold.

    Attributes:
      field: what names the model, to begin an error's message with.
      kinds: {architecture in config.json: kind of model}. files: {kind: files that it
      must have besides the weights}. optional: further files to fetch. description: all
      of it in words. instead: {file: another that makes it needless}.
    """

    field: str
    kinds: dict[str, str]
    files: dict[str, tuple[str, ...]]
    optional: tuple[str, ...]
    description: str
    instead: dict[str, str] = {}


def check_spec(field: str, spec: str) -> None:
    """Raises UserError for a word that is neither "judge" nor a folder or hub id."""
    if "/" not in spec and not os.path.isdir(os.path.expanduser(spec)):
        choice(field, spec, ("judge", "a folder", "a hub id (org/name)"))


def locate(spec: str, required: Requirements) -> tuple[Path, str]:
    """Returns (folder, the name to print) of a folder or hub id, which is fetched.

    Raises: UnavailableError if there is neither.
    """
    folder, (name, _, revision) = Path(os.path.expanduser(spec)), spec.partition("@")
    if os.path.isdir(folder):
        return folder, folder.resolve().name
    fix = f"put {required.description} into a local folder and name that"
    if not hub.is_id(name):
        raise UnavailableError(f"{required.field}={spec!r}: no such folder; {fix}")
    files = {name for names in required.files.values() for name in names}
    patterns = ("LICENSE*", *sorted(files), *required.optional, *_WEIGHTS)
    try:
        return hub.fetch(name, revision, wanted=patterns, field=required.field), spec
    except UserError as error:
        raise UnavailableError(f"{error}; or {fix}") from None


def check(folder: Path, spec: str, required: Requirements) -> str:
    """Returns the kind of model in a folder whose files are all there.

    Raises: UnavailableError naming the file that is missing, or if the weights are only
      pickles. UserError for an architecture, or an activation, that is not supported.
    """
    _check_present(folder, ("config.json",), spec, required)
    kind = _kind(folder / "config.json", required.kinds)
    _check_present(folder, required.files[kind], spec, required)
    _check_weight_files(folder, spec, required)
    return kind


def _check_present(folder, names, spec, required):
    for name in names:
        other = required.instead.get(name, name)
        if not (folder / name).is_file() and not (folder / other).is_file():
            raise UnavailableError(
                f"{required.field}={spec!r}: {folder / name} is missing; needed are "
                f"{required.description}"
            )


def _check_weight_files(folder, spec, required):
    try:
        files = weight_files.weight_files(folder, "model")
    except UserError as error:
        if any(p.suffix in safetensors_io.PICKLES for p in folder.iterdir()):
            raise UnavailableError(f"{required.field}={spec!r}: {error}") from None
        raise UnavailableError(
            f"{required.field}={spec!r}: {folder / 'model.safetensors'} is missing; "
            "where the hub has only a pickle, name a revision that has safetensors "
            "(org/name@refs/pr/1), or a folder saved with "
            "save_pretrained(..., safe_serialization=True)"
        ) from None
    _check_present(folder, [file.name for file in files], spec, required)


def _kind(file, kinds):
    config = safetensors_io.read_json(file)
    architecture, *_ = config.get("architectures") or [config.get("model_type")]
    if architecture not in kinds:
        raise UserError(
            f"{file}: architectures has {architecture!r}; must be one of "
            f"{', '.join(kinds)}"
        )
    for part in (config, config.get("vision_config"), config.get("text_config")):
        activation = (part or {}).get("hidden_act", "gelu")
        if activation not in _ACTIVATIONS:
            raise UserError(
                f"{file}: hidden_act={activation!r} is not supported; must be one of "
                f"{', '.join(_ACTIVATIONS)}"
            )
    return kinds[architecture]
