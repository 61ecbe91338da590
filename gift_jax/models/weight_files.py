# SPDX-License-Identifier: Apache-2.0
"""Which files of a component's folder hold its weights: one, its shards, a variant."""

import os
import re
from pathlib import Path

from gift_jax.models import safetensors_io
from gift_jax.runtime.errors import UserError, shown


def weight_files(directory, stem, variant=""):
    """Returns the safetensors files of a component: one file, or its shards.

    Args: variant: "" takes the plain files, or the only variant if there are none;
      a name ("fp16") takes that variant's.
    Raises: UserError if there is none; says so if there are only pickles.
    Source: diffusers' and transformers' names of files and shards.
    """
    found = _files(directory, stem, variant) or _files(directory, stem, "")
    if found:
        return found
    others = [] if variant else _variants(directory, stem)
    if others:
        return _files(directory, stem, others[0])
    pickles = sorted(
        p.name for p in directory.glob("*") if p.suffix in safetensors_io.PICKLES
    )
    if pickles:
        raise UserError(
            f"{directory}: has only {pickles[0]}, a pickle, which can run code and is "
            "never loaded; save the model as safetensors "
            "(save_pretrained(..., safe_serialization=True))"
        )
    raise UserError(
        f"{directory}: no {stem}.safetensors; is this a diffusers model folder?"
    )


def _files(directory, stem, variant):
    """Returns the files of one variant, "" for the plain ones; [] if there are none."""
    dotted = f".{variant}" if variant else ""
    single = directory / f"{stem}{dotted}.safetensors"
    index = directory / f"{stem}.safetensors.index{dotted}.json"
    if os.path.lexists(single) and os.path.lexists(index):
        raise UserError(
            f"{directory}: has both {single.name} and the shards of {index.name}, of "
            "which libraries read one or the other; delete what is older"
        )
    if os.path.lexists(single):
        return [single]
    return shards(index) if os.path.lexists(index) else []


def _variants(directory, stem):
    """The variant's name if there is exactly one; UserError if there are several."""
    pattern = re.compile(
        rf"{re.escape(stem)}\.(?:(\w+)\.safetensors|safetensors\.index\.(\w+)\.json)"
    )
    matches = [pattern.fullmatch(p.name) for p in sorted(directory.glob("*"))]
    variants = sorted({m[1] or m[2] for m in matches if m})
    if len(variants) > 1:
        raise UserError(
            f"{directory}: has only the variants {', '.join(variants)}; choose one "
            f"with --config.variant={variants[0]}"
        )
    return variants


def has_variant(directory, stem, variant):
    """Whether a component has files of its own for this variant."""
    names = f"{stem}.{variant}.safetensors", f"{stem}.safetensors.index.{variant}.json"
    return any((directory / name).is_file() for name in names)


def shards(index):
    """Returns the files that an index of shards names, sorted.

    Raises: UserError if it names none, or one that is not beside it.
    """
    weight_map = safetensors_io.read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map; copy it again")
    names = sorted({str(shard) for shard in weight_map.values()})
    for shard in names:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(
                f"{index}: names the shard {shown(shard)}; must be a safetensors file "
                "beside it"
            )
    return [index.parent / name for name in names]
