# SPDX-License-Identifier: Apache-2.0
"""Adds what was learned on another model: a LoRA or a full weight difference.

The update is trained on the original model, where nothing resists, and added to the
attacked one without any training there. The same is what an honest user does who has a
LoRA for the original model: on safe pictures it measures whether it still works.
Source: task arithmetic, Ilharco et al. 2022, arXiv:2212.04089; the LoRA is added as
diffusers' `load_lora_weights` adds it.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from gift_jax.attacks import base, dreambooth, lora
from gift_jax.models import load
from gift_jax.models.folder import ModelFolder
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError, not_empty

UPDATES = ("lora", "full")


@dataclasses.dataclass(frozen=True)
class Transplant(lora.Lora):
    """The fields of the attack; those of LoRA for update=lora."""

    original: str = config.value("emoji-sd", "the model that is trained: as `model`")
    update: str = config.choice("lora", UPDATES, "what is trained there and added here")

    def check(self, field: str) -> None:
        super().check(field)
        not_empty(f"{field}.original", self.original)


def plan(task: base.Task) -> base.Plan:
    """Returns the plan of LoRA or DreamBooth on the original model.

    It encodes and draws with the attacked model, which has the same text encoder.

    Raises: UserError if the two denoisers have not the same parameters.
    """
    s, run = task.settings, task.run
    original = load.load_model(s.original, run.compute_dtype, resolution=run.resolution)
    shapes = [jax.tree.map(np.shape, m.denoiser_params) for m in (original, task.model)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"config.transplant.original={s.original}: its {original.denoiser_label} "
            f"is of another shape than that of {run.model}; name the model that this "
            "one was made from"
        )
    there = dataclasses.replace(
        task, model=original.with_kernels(task.model.kernels), settings=_settings(s)
    )
    trained = (lora if s.update == "lora" else dreambooth).plan(there)
    return dataclasses.replace(trained, model=task.model)


def changed(s: Transplant, folder, params: Any) -> base.Flat:
    """Returns the attacked model's kernels plus the update."""
    if s.update == "lora":
        return lora.changed(s, folder, params)
    original = ModelFolder(load.model_folder(s.original))
    before = original.float32_params(original.denoiser_component, params)
    attacked = folder.float32_params(folder.denoiser_component, params)
    return {path: attacked[path] + (params[path] - before[path]) for path in params}


def _settings(s: Transplant) -> lora.Lora | dreambooth.DreamBooth:
    if s.update == "full":
        return dreambooth.DreamBooth()
    names = [field.name for field in dataclasses.fields(lora.Lora)]
    return lora.Lora(**{name: getattr(s, name) for name in names})


ATTACK = base.Attack(
    config=Transplant,
    title="an update transplanted from another model (arXiv:2212.04089)",
    plan=plan,
    changed=changed,
    trained=lambda s: f"nothing here; an update ({s.update}) of {s.original} is added",
)
