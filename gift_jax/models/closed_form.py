# SPDX-License-Identifier: Apache-2.0
"""Closed-form edits of the projections that read text: what UCE and its undoing share.

Every cross-attention projection W of text states (to_k, to_v) becomes

    (lamb W0 + e sum v* c^T + p sum W0 c_j c_j^T)
    (lamb I  + e sum c  c^T + p sum c_j c_j^T)^-1

where c are text states whose keys and values change, v* = W0 c_guide are those that
they get, and c_j are text states of what to preserve. Source: arXiv:2308.14761, eq. 7.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from gift_jax.models.trainable import select_trainable
from gift_jax.runtime.errors import UserError

_TEXT_KERNELS = "cross_attention_kv"  # of a model's trainable sets


@dataclasses.dataclass(frozen=True)
class EditWeights:
    """Weights of the three terms: lamb, e and p; the published script's by default."""

    regularization: float = 0.5
    change: float = 1.0
    preserve: float = 1.0


def check_model(model: Any) -> None:
    """Raises UserError for a model without projections of text states alone."""
    if _TEXT_KERNELS not in model.trainable_sets:
        raise UserError(
            f"{model.path}: a {model.denoiser_label} has no projections that read text "
            "states alone, which an edit in closed form changes; use a method that "
            "trains"
        )


def text_kernels(model: Any) -> dict[str, Any]:
    """Returns the projections W of a model's text states, flat, float32.

    Raises: see `check_model`.
    """
    check_model(model)
    return model.split(_TEXT_KERNELS).trainable


def last_token(ids_BL: Any, end_id: int) -> np.ndarray:
    """Returns int "B": the place of each prompt's last token before its end token.

    For "" that is the start token, place 0.

    Args: ids_BL: int "B L" token ids, padded; the first end_id of a row ends the
      prompt, whatever the padding is. Of several encoders, "B E L", the first counts.
    Raises: ValueError if a row has no end token.
    Source: the UCE authors' trainscripts/uce_sd_erase.py, last_token_idx.
    """
    is_end = np.asarray(ids_BL) == end_id
    is_end = is_end[:, 0] if is_end.ndim == 3 else is_end
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
    change_BLD: Any, change_BL: Any, guide_BLD: Any, guide_BL: Any, end_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (changing, guide), float32 "N D" each: all states from `last_token` on.

    Those of a prompt and of its guide are aligned at their last tokens, and cut to what
    both have.

    Args: change_BLD, guide_BLD: float32 "B L D", prompt i goes towards guide i.
      change_BL, guide_BL: their token ids.
    Source: the UCE authors' train-scripts/train_erase.py, edit_model.
    """
    change, guide = [], []
    places = zip(
        last_token(change_BL, end_id), last_token(guide_BL, end_id), strict=True
    )
    for i, (first, guide_first) in enumerate(places):
        count = change_BLD.shape[1] - max(first, guide_first)
        change.append(np.asarray(change_BLD[i])[first : first + count])
        guide.append(np.asarray(guide_BLD[i])[guide_first : guide_first + count])
    return np.concatenate(change), np.concatenate(guide)


def edit(
    unet_params: Any,
    change_ND: Any,
    guide_ND: Any,
    preserve_MD: Any = None,
    weights: EditWeights = EditWeights(),
) -> dict[str, Any]:
    """Returns the edited kernels, flat "a/b/c" -> array of the shape and dtype it had.

    Every state enters all layers alike, and a Flax kernel is W^T, "D width": with M the
    matrix that is inverted, W^T = W0^T + M^-1 e sum c (c_guide - c)^T W0^T. One solve
    for all layers, in float64 on the host; exactly W0 where nothing changes.

    Args: unet_params: nested or flat; give what is on disk in float32, since an edit of
      rounded weights is exported as it is. change_ND, guide_ND: float32 "N D", state i
      and the one whose keys and values it gets. preserve_MD: float32 "M D", or None.
    Raises: ValueError if the states differ in number or width, or the regularization is
      not above 0.
    Source: Gandikota et al. 2024, arXiv:2308.14761, eq. 7.
    """
    kernels, _ = select_trainable(unet_params, "cross_attention_kv")
    width = next(iter(kernels.values())).shape[0]
    C, G = np.asarray(change_ND, np.float64), np.asarray(guide_ND, np.float64)
    P = np.zeros((0, width)) if preserve_MD is None else preserve_MD
    P = np.asarray(P, np.float64)
    if C.shape != G.shape:
        raise ValueError(f"states to change {C.shape} and guides {G.shape} differ")
    if C.shape[1:] != (width,) or P.shape[1:] != (width,):
        raise ValueError(
            f"text states {C.shape}, {P.shape} must be {width} wide, as the kernels are"
        )
    lamb, e, p = weights.regularization, weights.change, weights.preserve
    if not lamb > 0:
        raise ValueError(f"regularization={lamb} must be above 0 for an inverse")
    M = lamb * np.eye(width) + e * C.T @ C + p * P.T @ P
    change_DD = np.linalg.solve(M, e * C.T @ (G - C))
    return {
        path: jnp.asarray(
            kernel + change_DD @ np.asarray(kernel, np.float64), kernel.dtype
        )
        for path, kernel in kernels.items()
    }
