# SPDX-License-Identifier: Apache-2.0
"""The transformer as what noise processes, attacks and samplers call."""

import dataclasses

from gift_jax.models.mmdit.transformer import Transformer, apply_transformer


@dataclasses.dataclass(frozen=True)
class Network:
    """The transformer as a denoiser's forward pass; hashable, without parameters."""

    transformer: Transformer

    def predict(self, params, z_t, t, cond, capture=()):
        """Returns (velocity, captured hidden states), see `diffusion.Denoiser`.

        Args: t: float "B", 1000 sigma. cond: "states" and "pooled".
        """
        dtype = self.transformer.dtype
        inputs = z_t.astype(dtype), t
        text = (cond[name].astype(dtype) for name in ("states", "pooled"))
        return apply_transformer(self.transformer, params, *inputs, *text, capture)

    def with_cond(self, params, cond):
        """Returns (z_t, t) -> velocity, for many calls on the same conditioning.

        Nothing can be left out: the text's stream depends on the image's.
        """

        def predict(z_t, t):
            return self.predict(params, z_t, t, cond)[0]

        return predict
