# SPDX-License-Identifier: Apache-2.0
"""From prompts to conditioning: the two CLIPs and the T5 of Stable Diffusion 3.

Axes: B batch, L tokens, D width, P width of the pooled text. A prompt's token ids are
one row, "L": CLIP's, CLIP's, and T5's if there is one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gift_jax.models.mmdit.t5 import T5Encoder, apply_t5
from gift_jax.models.mmdit.transformer import Transformer
from gift_jax.models.sd.clip import ProjectedTextEncoder, apply_text
from gift_jax.models.sd.text import as_text, padded_ids, warn_of_cut
from gift_jax.runtime.errors import UserError

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
T5_LENGTH = 256  # tokens, diffusers' max_sequence_length


@dataclasses.dataclass(frozen=True)
class TextEncoders:
    """The modules that encode text; hashable, without parameters.

    Attributes: clips: CLIP-L and OpenCLIP-bigG. t5: or None, if the folder has none.
      width: D of the states. clip_length, t5_length: tokens of each.
    """

    clips: tuple[ProjectedTextEncoder, ProjectedTextEncoder]
    t5: T5Encoder | None
    width: int
    clip_length: int = 77
    t5_length: int = T5_LENGTH

    @property
    def modules(self) -> tuple[Any, ...]:
        """Those that there are, in the order of `TEXT_ENCODERS`."""
        return self.clips if self.t5 is None else (*self.clips, self.t5)

    @property
    def repeats(self) -> int:
        """How many equal tokens the last of the states stands for."""
        return 1 if self.t5 else self.t5_length

    @property
    def components(self) -> tuple[str, ...]:
        """The folders of the modules."""
        return TEXT_ENCODERS[: len(self.modules)]

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many token ids each module reads."""
        return (self.clip_length, self.clip_length, self.t5_length)[: len(self.modules)]

    @property
    def ids_shape(self) -> tuple[int]:
        """Of one prompt's token ids, (L,)."""
        return (sum(self.lengths),)

    def encode(self, params: Mapping[str, Any], ids: jax.Array) -> dict[str, jax.Array]:
        """Returns the conditioning of token ids, float32.

        Args: params: {component: nested parameters}. ids: int32 "B L".
        Returns: "states", "B L D": the CLIPs' penultimate ones side by side, zeros up
          to D, and then T5's last ones; in their place one of zeros, which stands for
          `repeats`. "pooled", "B P": the CLIPs' projected ones side by side.
        Source: diffusers `StableDiffusion3Pipeline.encode_prompt` (no clip skip).
        """
        ends = np.cumsum(self.lengths)[:-1]
        parts = jnp.split(ids, ends, axis=1)
        outs = [
            apply_text(module, params[name], part)
            for module, name, part in zip(
                self.clips, TEXT_ENCODERS, parts, strict=False
            )
        ]
        clip_BLD = jnp.concatenate([_float32(out.penultimate) for out in outs], axis=-1)
        rest = self.width - clip_BLD.shape[-1]
        clip_BLD = jnp.pad(clip_BLD, [(0, 0), (0, 0), (0, rest)])
        if self.t5 is None:
            t5_BLD = jnp.zeros((len(ids), 1, self.width))
        else:
            t5_BLD = _float32(apply_t5(self.t5, params[TEXT_ENCODERS[2]], parts[2]))
        pooled = [_float32(out.pooled) for out in outs]
        return {
            "states": jnp.concatenate([clip_BLD, t5_BLD], axis=1),
            "pooled": jnp.concatenate(pooled, axis=-1),
        }

    def check_fits(self, transformer: Transformer, path: Path | None) -> None:
        """Raises UserError unless a transformer reads what the modules return.

        Args: path: of the model, for the message.
        """
        widths = [module.config.hidden_size for module in self.clips]
        pooled = sum(module.config.projection_dim for module in self.clips)
        width = transformer.joint_attention_dim
        if sum(widths) > width:
            raise UserError(
                f"{path}: text_encoder + text_encoder_2 hidden_size={sum(widths)}, but "
                f"transformer joint_attention_dim={width}; must be at most that"
            )
        if self.t5 is not None and self.t5.config.d_model != width:
            raise UserError(
                f"{path}: text_encoder_3 d_model={self.t5.config.d_model}, but "
                f"transformer joint_attention_dim={width}; they must be equal"
            )
        if pooled != transformer.pooled_projection_dim:
            raise UserError(
                f"{path}: text_encoder + text_encoder_2 projection_dim={pooled}, but "
                f"transformer pooled_projection_dim={transformer.pooled_projection_dim}"
                "; they must be equal"
            )


def _float32(array: Any) -> jax.Array:
    return array.astype(jnp.float32)


def tokenize(
    tokenizers: Sequence[Any],
    encoders: Any,
    prompts: Sequence[str],
    path: Path | None,
) -> np.ndarray:
    """Returns int32 "B L" token ids, each tokenizer's padded and cut to its length.

    Args: tokenizers: one for each module. encoders: with `modules` and `lengths`.
      path: of the model, for errors.
    Raises: UserError for an id that a text encoder has no row for.
    """
    texts, ids = as_text(prompts), []
    for tokenizer, module, length in zip(
        tokenizers, encoders.modules, encoders.lengths, strict=True
    ):
        rows = module.config.vocab_size
        ids.append(padded_ids(tokenizer, rows, length, texts, path))
    warn_of_cut(tokenizers[-1], ids[-1], texts)  # T5's, which reads the most
    return np.concatenate(ids, axis=1)
