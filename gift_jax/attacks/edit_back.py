# SPDX-License-Identifier: Apache-2.0
"""Gives a word the keys and values of another in closed form, as UCE does.

A defense that acts on the concept's name leaves what other words mean. This attack
takes the prompts that it will use (a nonce word, say) and gives them the keys and
values of `source`, the words that carry the concept: no picture, no step.
Source: the equation of UCE (models/closed_form.py) with the concept as the guide.
"""

import dataclasses

import numpy as np

from gift_jax.attacks import base
from gift_jax.data import captions
from gift_jax.models import closed_form
from gift_jax.runtime import config
from gift_jax.runtime.errors import not_empty


@dataclasses.dataclass(frozen=True)
class EditBack:
    """The fields of the attack."""

    source: str = config.value(
        "", "prompt, or template, whose keys and values the data's get"
    )
    regularization: float = config.number(
        0.5, above=0, doc="weight of the projections as they are"
    )

    def check(self, field: str) -> None:
        not_empty(f"{field}.source", self.source)
        captions.check_template(f"{field}.source", self.source)


def edit(task: base.Task) -> base.Flat:
    """Returns the edited projections; all states from the last word on are changed."""
    s, model = task.settings, task.model
    kernels = closed_form.text_kernels(model)
    data = task.data["data"]
    names = zip(data.concepts, data.styles, strict=True)
    sources = [captions.fill(s.source, thing, style) for thing, style in names]
    pairs = dict.fromkeys(zip(data.prompts, sources, strict=True))
    prompts, guides = ([pair[i] for pair in pairs] for i in (0, 1))
    states = [np.asarray(model.encode_text(p)["states"]) for p in (prompts, guides)]
    ids = [model.tokenize(p) for p in (prompts, guides)]
    end = model.tokenizer.eos_token_id
    change, guide = closed_form.tail_states(states[0], ids[0], states[1], ids[1], end)
    return closed_form.edit(
        kernels,
        change,
        guide,
        weights=closed_form.EditWeights(regularization=s.regularization),
    )


ATTACK = base.Attack(
    config=EditBack,
    title="closed-form edit of a word (arXiv:2308.14761)",
    edit=edit,
    trained=lambda s: "nothing; its text projections are edited in closed form",
)
