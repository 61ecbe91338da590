# SPDX-License-Identifier: Apache-2.0
"""UCE: erases concepts in closed form (arXiv:2308.14761).

The keys and values of what to erase become those of what takes its place, see
models/closed_form.py for the equation. Seconds, no training.

Which text states stand for a prompt is not in the equation. The authors' published
script takes one, the prompt's last token before the end token (`last_states`); the
paper's own code takes that and all that follow it, which carry the concept too
(`tail_states`).
"""

import dataclasses

import numpy as np

from gift_jax.data import captions
from gift_jax.defenses import base
from gift_jax.models.closed_form import (
    EditWeights,
    check_model,
    edit,
    last_states,
    tail_states,
    text_kernels,
)
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError, shown

TOKEN_STATES = ("last", "tail")


@dataclasses.dataclass(frozen=True)
class Uce:
    """The fields of UCE; the defaults are the published script's."""

    regularization: float = config.number(
        0.5, above=0, doc="lamb, weight of the original projections"
    )
    erase: float = config.number(1.0, low=0, doc="e, weight of the harmful prompts")
    preserve: float = config.number(1.0, low=0, doc="p, weight of the safe prompts")
    replacement_prompt: str = config.value(
        "", "what takes an erased prompt's place; may have {style} or {a_style}"
    )
    token_states: str = config.choice(
        "last", TOKEN_STATES, "states of a prompt: its last token's, or all from it on"
    )

    @property
    def weights(self) -> EditWeights:
        """Of the three terms of the equation."""
        return EditWeights(self.regularization, self.erase, self.preserve)

    def check(self, field: str) -> None:
        try:
            captions.fill(self.replacement_prompt, "", "style")
        except ValueError as error:
            raise UserError(
                f"{field}.replacement_prompt={shown(self.replacement_prompt)} may use "
                "only {style} and {a_style}"
            ) from error


def edit_model(task: base.Task) -> base.Flat:
    """Returns the edit of harmful prompts towards the replacement, safe ones kept."""
    s, model, harmful = task.settings, task.model, task.data["harmful"]

    def states(prompts):
        return np.asarray(model.encode_text(prompts)["states"]), model.tokenize(prompts)

    end = model.tokenizer.eos_token_id
    guides = [captions.fill(s.replacement_prompt, "", name) for name in harmful.styles]
    texts = harmful.captions or [(prompt,) for prompt in harmful.prompts]
    rows = zip(texts, guides, strict=True)
    pairs = list(dict.fromkeys((t, guide) for several, guide in rows for t in several))
    erase, erase_ids = states([prompt for prompt, _ in pairs])
    guide, guide_ids = states([guide for _, guide in pairs])
    keep, keep_ids = states(task.data["safe"].every_caption)
    if s.token_states == "tail":
        erase, guide = tail_states(erase, erase_ids, guide, guide_ids, end)
        keep = keep.reshape(-1, keep.shape[-1])
    else:
        erase = last_states(erase, erase_ids, end)
        guide = last_states(guide, guide_ids, end)
        keep = last_states(keep, keep_ids, end)
    return edit(text_kernels(model), erase, guide, keep, s.weights)


DEFENSE = base.Defense(
    config=Uce,
    title="UCE (arXiv:2308.14761)",
    edit=edit_model,
    check=lambda settings, model: check_model(model),
    optimizers=(),
    steps=lambda run: "none, but one solution in closed form",
    worst_case="100% after DreamBooth by the concept's name, as without a defense",
)
