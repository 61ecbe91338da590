# SPDX-License-Identifier: Apache-2.0
"""UCE: erases concepts in closed form (arXiv:2308.14761).

Every cross-attention projection W of text states (to_k, to_v) becomes

    (lamb W0 + e sum v* c^T + p sum W0 c_j c_j^T)
    (lamb I  + e sum c  c^T + p sum c_j c_j^T)^-1

where c are text states of what to erase, v* = W0 c_guide is what the original makes of
what takes its place, and c_j are text states of what to preserve. Seconds, no training.

Which text states stand for a prompt is not in the equation. The authors' published
script takes one, the prompt's last token before the end token (`last_states`); the
paper's own code takes that and all that follow it, which carry the concept too
(`tail_states`).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from gift_jax.data import captions
from gift_jax.defenses import base
from gift_jax.models.trainable import select_trainable
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

    def check(self, field: str) -> None:
        try:
            captions.fill(self.replacement_prompt, "", "style")
        except ValueError as error:
            raise UserError(
                f"{field}.replacement_prompt={shown(self.replacement_prompt)} may use "
                "only {style} and {a_style}"
            ) from error


def last_token(ids_BL: Any, end_id: int) -> np.ndarray:
    """Returns int "B": the place of each prompt's last token before its end token.

    For "" that is the start token, place 0.

    Args: ids_BL: int "B L" token ids, padded; the first end_id of a row ends the
      prompt, whatever the padding is.
    Raises: ValueError if a row has no end token.
    Source: the authors' trainscripts/uce_sd_erase.py, last_token_idx.
    """
    is_end = np.asarray(ids_BL) == end_id
    if not is_end.any(axis=1).all():
        raise ValueError(f"a prompt's token ids have no end token {end_id}")
    return np.argmax(is_end, axis=1) - 1


def last_states(text_BLD: Any, ids_BL: Any, end_id: int) -> np.ndarray:
    """Returns float32 "B D": each prompt's text state at its `last_token`.

    Args: text_BLD: float32 "B L D", as the model encodes prompts. ids_BL:
      their token ids, as the model tokenizes.
    """
    place_B = last_token(ids_BL, end_id)
    return np.asarray(text_BLD)[np.arange(len(place_B)), place_B]


def tail_states(
    erase_BLD: Any, erase_BL: Any, guide_BLD: Any, guide_BL: Any, end_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (erase, guide), float32 "N D" each: all states from `last_token` on.

    Those of a prompt and of its guide are aligned at their last tokens, and cut to what
    both have.

    Args: erase_BLD, guide_BLD: float32 "B L D", prompt i goes towards guide i.
      erase_BL, guide_BL: their token ids.
    Source: the authors' train-scripts/train_erase.py, edit_model.
    """
    erase, guide = [], []
    places = zip(
        last_token(erase_BL, end_id), last_token(guide_BL, end_id), strict=True
    )
    for i, (first, guide_first) in enumerate(places):
        count = erase_BLD.shape[1] - max(first, guide_first)
        erase.append(np.asarray(erase_BLD[i])[first : first + count])
        guide.append(np.asarray(guide_BLD[i])[guide_first : guide_first + count])
    return np.concatenate(erase), np.concatenate(guide)


def edit(
    unet_params: Any,
    erase_ND: Any,
    guide_ND: Any,
    preserve_MD: Any = None,
    s: Uce = Uce(),
) -> dict[str, Any]:
    """Returns the edited kernels, flat "a/b/c" -> array of the shape and dtype it had.

    Every state enters all layers alike, and a Flax kernel is W^T, "D width": with M the
    matrix that is inverted, W^T = W0^T + M^-1 e sum c (c_guide - c)^T W0^T. One solve
    for all layers, in float64 on the host; exactly W0 where nothing is erased.

    Args: unet_params: nested or flat; give what is on disk in float32, since an edit of
      rounded weights is exported as it is. erase_ND, guide_ND: float32 "N D", state i
      of what to erase and the one that takes its place. preserve_MD: float32 "M D", or
      None.
    Raises: ValueError if the states differ in number or width, or the regularization is
      not above 0.
    Source: Gandikota et al. 2024, arXiv:2308.14761, eq. 7.
    """
    kernels, _ = select_trainable(unet_params, "cross_attention_kv")
    width = next(iter(kernels.values())).shape[0]
    C, G = np.asarray(erase_ND, np.float64), np.asarray(guide_ND, np.float64)
    P = np.zeros((0, width)) if preserve_MD is None else preserve_MD
    P = np.asarray(P, np.float64)
    if C.shape != G.shape:
        raise ValueError(f"states to erase {C.shape} and guides {G.shape} differ")
    if C.shape[1:] != (width,) or P.shape[1:] != (width,):
        raise ValueError(
            f"text states {C.shape}, {P.shape} must be {width} wide, as the kernels are"
        )
    if not s.regularization > 0:
        raise ValueError(
            f"regularization={s.regularization} must be above 0 for an inverse"
        )
    M = s.regularization * np.eye(width) + s.erase * C.T @ C + s.preserve * P.T @ P
    change_DD = np.linalg.solve(M, s.erase * C.T @ (G - C))
    return {
        path: jnp.asarray(
            kernel + change_DD @ np.asarray(kernel, np.float64), kernel.dtype
        )
        for path, kernel in kernels.items()
    }


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
    kernels = model.split("cross_attention_kv").trainable
    return edit(kernels, erase, guide, keep, s)


DEFENSE = base.Defense(
    config=Uce,
    title="UCE (arXiv:2308.14761)",
    edit=edit_model,
    optimizers=(),
    steps=lambda run: "none, but one solution in closed form",
)
