# SPDX-License-Identifier: Apache-2.0
"""Folders of pretrained models to measure with: found or fetched, and complete."""

import os
from pathlib import Path
from typing import NamedTuple

from gift_jax.metrics.base import MissingWeights
from gift_jax.models import hub, safetensors_io
from gift_jax.runtime.errors import UserError

_WEIGHTS = (  # patterns of what the hub is asked for
    ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
)
_ACTIVATIONS = (  # that Flax computes as PyTorch does
    ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish")
)


class Wanted(NamedTuple):
    """What is wanted of a model's folder.

    Attributes: field: what asks for the model, to begin an error's message with.
      kinds: {architecture in config.json: kind of model}. files: {kind: files that it
      must have besides the weights}. optional: further files to fetch. needed: all of
      it in words.
    """

    field: str
    kinds: dict[str, str]
    files: dict[str, tuple[str, ...]]
    optional: tuple[str, ...]
    needed: str


def find(spec: str, wanted: Wanted) -> tuple[Path, str]:
    """Returns (folder, the name to print) of a folder or hub id, which is fetched.

    Raises: MissingWeights if there is neither.
    """
    folder, (name, _, revision) = Path(os.path.expanduser(spec)), spec.partition("@")
    if os.path.isdir(folder):
        return folder, folder.resolve().name
    cure = f"put {wanted.needed} into a local folder and name that"
    if not hub.is_id(name):
        raise MissingWeights(f"{wanted.field}={spec!r}: no such folder; {cure}")
    files = {name for names in wanted.files.values() for name in names}
    patterns = ("LICENSE*", *sorted(files), *wanted.optional, *_WEIGHTS)
    try:
        return hub.fetch(name, revision, wanted=patterns, field=wanted.field), spec
    except UserError as error:
        raise MissingWeights(f"{error}; or {cure}") from None


def check(folder: Path, spec: str, wanted: Wanted) -> str:
    """Returns the kind of model in a folder whose files are all there.

    Raises: MissingWeights naming the file that is missing, or if the weights are only
      pickles. UserError for an architecture, or an activation, that is not supported.
    """
    _check_present(folder, ("config.json",), spec, wanted)
    kind = _kind(folder / "config.json", wanted.kinds)
    _check_present(folder, wanted.files[kind], spec, wanted)
    _check_weight_files(folder, spec, wanted)
    return kind


def _check_present(folder, names, spec, wanted):
    for name in names:
        if not (folder / name).is_file():
            raise MissingWeights(
                f"{wanted.field}={spec!r}: {folder / name} is missing; needed are "
                f"{wanted.needed}"
            )


def _check_weight_files(folder, spec, wanted):
    try:
        files = safetensors_io.weight_files(folder, "model")
    except UserError as error:
        if any(p.suffix in safetensors_io.PICKLES for p in folder.iterdir()):
            raise MissingWeights(f"{wanted.field}={spec!r}: {error}") from None
        raise MissingWeights(
            f"{wanted.field}={spec!r}: {folder / 'model.safetensors'} is missing; "
            "where the hub has only a pickle, name a revision that has safetensors "
            "(org/name@refs/pr/1), or a folder saved with "
            "save_pretrained(..., safe_serialization=True)"
        ) from None
    _check_present(folder, [file.name for file in files], spec, wanted)


def _kind(file, kinds):
    config = safetensors_io.read_json(file)
    found = config.get("architectures") or [config.get("model_type")]
    if found[0] not in kinds:
        raise UserError(
            f"{file}: architectures has {found[0]!r}; must be one of {', '.join(kinds)}"
        )
    for part in (config, config.get("vision_config"), config.get("text_config")):
        activation = (part or {}).get("hidden_act", "gelu")
        if activation not in _ACTIVATIONS:
            raise UserError(
                f"{file}: hidden_act={activation!r} is not supported; must be one of "
                f"{', '.join(_ACTIVATIONS)}"
            )
    return kinds[found[0]]
