# SPDX-License-Identifier: Apache-2.0
"""From prompts to conditioning: one text encoder of SD 1.x and 2.x, two of SDXL.

Axes: B batch, E encoders, L tokens, D width, P width of the pooled text.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from gift_jax.models.sd.clip import TextEncoder, apply_text
from gift_jax.models.tokenizer import every_vector
from gift_jax.models.weights import TEXT_ENCODERS
from gift_jax.runtime.errors import UserError, shown


@dataclasses.dataclass(frozen=True)
class TextEncoders:
    """The modules that encode text; hashable, without parameters.

    Attributes: modules: of `TEXT_ENCODERS`, in this order. end_id: set for a model
      whose unconditional prompt is zeros in place of the encoded "": the end token, by
      which "" is known; else None.
    """

    modules: tuple[TextEncoder, ...]
    end_id: int | None = None

    @property
    def components(self) -> tuple[str, ...]:
        """The folders of the modules."""
        return TEXT_ENCODERS[: len(self.modules)]

    @property
    def max_length(self) -> int:
        """The most tokens that all of them take."""
        return min(m.config.max_position_embeddings for m in self.modules)

    def encode(self, params: Mapping[str, Any], ids: jax.Array) -> dict[str, jax.Array]:
        """Returns the conditioning of token ids, float32.

        Args: params: {component: nested parameters}. ids: int32, "B L" for one encoder,
          "B E L" for several.
        Returns: "states": the last hidden states, "B L D"; of several encoders the
          penultimate ones side by side, and "pooled": the last encoder's, "B P".
        Source: diffusers `StableDiffusionPipeline.encode_prompt`,
          `StableDiffusionXLPipeline.encode_prompt` (no clip skip).
        """
        if len(self.modules) == 1:
            (module,), (name,) = self.modules, self.components
            return {"states": _float32(apply_text(module, params[name], ids).last)}
        outs = [
            apply_text(module, params[name], ids[:, i])
            for i, (module, name) in enumerate(
                zip(self.modules, self.components, strict=True)
            )
        ]
        states = [_float32(out.penultimate) for out in outs]
        cond = {
            "states": jnp.concatenate(states, axis=-1),
            "pooled": _float32(outs[-1].pooled),
        }
        if self.end_id is None:
            return cond
        is_empty_B = ids[:, 0, 1] == self.end_id
        return {
            name: jnp.where(is_empty_B.reshape(-1, *[1] * (a.ndim - 1)), 0.0, a)
            for name, a in cond.items()
        }

    def resized(self, rows: int) -> "TextEncoders":
        """Returns the modules with so many rows in their token tables."""
        modules = (
            m.clone(config=dataclasses.replace(m.config, vocab_size=rows))
            for m in self.modules
        )
        return dataclasses.replace(self, modules=tuple(modules))


def _float32(array: jax.Array) -> jax.Array:
    return array.astype(jnp.float32)


def tokenize(
    tokenizers: Sequence[Any],
    encoders: TextEncoders,
    max_length: int,
    prompts: Sequence[str],
    path: Path | None,
) -> np.ndarray:
    """Returns int32 token ids, "B L", or of several tokenizers "B E L".

    Padded and cut to the model's length. A word added for several vectors ("<a>", with
    "<a>_1" ... beside it) becomes them all.

    Args: path: of the model, for errors.
    Raises: UserError for an id that a text encoder has no row for.
    """
    prompts = [every_vector(tokenizers[0], prompt) for prompt in as_text(prompts)]
    ids = [
        padded_ids(tokenizer, module.config.vocab_size, max_length, prompts, path)
        for tokenizer, module in zip(tokenizers, encoders.modules, strict=True)
    ]
    warn_of_cut(tokenizers[0], ids[0], prompts)
    return ids[0] if len(ids) == 1 else np.stack(ids, axis=1)


def as_text(prompts: Sequence[str]) -> list[str]:
    """Returns prompts without half a surrogate pair, as of bytes on a command line."""
    return [prompt.encode("utf-8", "replace").decode() for prompt in prompts]


def padded_ids(
    tokenizer: Any, rows: int, max_length: int, prompts: list[str], path: Path | None
) -> np.ndarray:
    """Returns int32 "B L" token ids, padded and cut to L.

    Args: rows: of the token table. path: of the model, for errors.
    Raises: UserError for an id that has no row.
    """
    encoded = tokenizer(
        prompts, padding="max_length", max_length=max_length, truncation=True
    )
    ids_BL = np.asarray(encoded["input_ids"], np.int32)
    if ids_BL.size and ids_BL.max() >= rows:
        raise UserError(
            f"{path}: the tokenizer gives id {ids_BL.max()}, but the text encoder "
            f"has {rows} rows; they are of different models"
        )
    return ids_BL


def warn_of_cut(tokenizer: Any, ids_BL: np.ndarray, prompts: Sequence[str]) -> None:
    """Logs the first prompt that has more tokens than L."""
    length = ids_BL.shape[1]
    for prompt, row in zip(prompts, ids_BL, strict=True):
        if row[-2] == tokenizer.pad_token_id:  # room was left
            continue
        if len(tokenizer(prompt, verbose=False)["input_ids"]) > length:
            logging.warning("cut to %d tokens: %s", length, shown(prompt))
            return
