# SPDX-License-Identifier: Apache-2.0
"""Moves the weights towards a public sibling: W + strength (W_sibling - W).

Who has the original model needs no attack; this one shows how little of it is enough.
No defense of weights stops it. Source: linear interpolation of fine-tuned models,
Wortsman et al. 2022, arXiv:2109.01903.
"""

import dataclasses

import numpy as np
from flax.traverse_util import flatten_dict

from gift_jax.attacks import base
from gift_jax.models import load
from gift_jax.models.folder import ModelFolder
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError, not_empty


@dataclasses.dataclass(frozen=True)
class Interpolation:
    """The fields of the attack."""

    sibling: str = config.value("emoji-sd", "the public model: as `model`")
    strength: float = config.number(0.5, low=0, high=1, doc="1: the sibling's weights")

    def check(self, field: str) -> None:
        not_empty(f"{field}.sibling", self.sibling)


def edit(task: base.Task) -> base.Flat:
    """Returns every parameter of the denoiser, moved.

    Raises: UserError if the two denoisers have not the same parameters.
    """
    s, model, folder = task.settings, task.model, task.model.folder
    paths = flatten_dict(model.denoiser_params, sep="/")
    ours = folder.float32_params(model.denoiser_component, paths)
    sibling = ModelFolder(load.model_folder(s.sibling))
    theirs = sibling.float32_params(sibling.denoiser_component, paths)
    if {p: a.shape for p, a in theirs.items()} != {p: a.shape for p, a in ours.items()}:
        raise UserError(
            f"config.interpolation.sibling={s.sibling}: its {model.denoiser_label} is "
            f"of another shape than that of {task.run.model}; name a model of the same "
            "kind"
        )
    strength = np.float32(s.strength)
    return {path: ours[path] + strength * (theirs[path] - ours[path]) for path in ours}


ATTACK = base.Attack(
    config=Interpolation,
    title="interpolation towards a public model (arXiv:2109.01903)",
    edit=edit,
    reads=lambda s: (),
    trained=lambda s: (
        f"nothing; the {{denoiser}} goes {s.strength:.0%} towards {s.sibling}"
    ),
)
