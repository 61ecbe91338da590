# SPDX-License-Identifier: Apache-2.0
"""From prompts to conditioning: the CLIP and the T5 of FLUX.1.

A prompt's token ids are one row, "L": CLIP's, and then T5's.
"""

import dataclasses

import jax.numpy as jnp

from gift_jax.models.mmdit.t5 import T5Encoder, apply_t5
from gift_jax.models.sd.clip import TextEncoder, apply_text

T5_LENGTH = 512  # tokens, diffusers' max_sequence_length


@dataclasses.dataclass(frozen=True)
class TextEncoders:
    """The modules that encode text; hashable, without parameters.

    Attributes: modules: CLIP-L and T5. lengths: tokens of each.
    """

    modules: tuple[TextEncoder, T5Encoder]
    lengths: tuple[int, int] = (77, T5_LENGTH)

    components = ("text_encoder", "text_encoder_2")

    @property
    def ids_shape(self) -> tuple[int]:
        """Of one prompt's token ids, (L,)."""
        return (sum(self.lengths),)

    def encode(self, params, ids):
        """Returns the conditioning of token ids, float32.

        Args: params: {component: nested parameters}. ids: int32 "B L".
        Returns: "states": T5's last ones, "B L D", padding and all. "pooled": CLIP's
          state of the end token, "B P", without a projection.
        Source: diffusers `FluxPipeline.encode_prompt`.
        """
        (clip, t5), (first, second) = self.modules, self.components
        split = self.lengths[0]
        pooled_BP = apply_text(clip, params[first], ids[:, :split]).pooled
        states_BLD = apply_t5(t5, params[second], ids[:, split:])
        cond = {"states": states_BLD, "pooled": pooled_BP}
        return {name: a.astype(jnp.float32) for name, a in cond.items()}
