# SPDX-License-Identifier: Apache-2.0
"""What models whose denoiser is a transformer of flow matching have in common."""

from collections.abc import Sequence
from typing import Any, ClassVar

from gift_jax.models import flow_schedule
from gift_jax.models.latent_diffusion import LatentDiffusion
from gift_jax.models.mmdit.network import Network
from gift_jax.models.mmdit.text import tokenize
from gift_jax.models.parts import Parts
from gift_jax.models.sd import adapters
from gift_jax.runtime.errors import UserError


class TransformerModel(LatentDiffusion):
    """A loaded model of a transformer, a VAE and text encoders of unequal kinds.

    A family's class names its rules, and why there are no textual inversions.

    Attributes: see `LatentDiffusion`. scheduler_config: of flow matching.
    """

    denoiser_component = "transformer"
    no_words: ClassVar[str]

    @property
    def noise(self):
        """The noise process that it is trained on."""
        return flow_schedule.noise_process(self.scheduler_config)

    @property
    def network(self):
        """The transformer's forward pass."""
        return Network(self.module)

    @property
    def ids_shape(self):
        """The shape of a prompt's token ids, (L,): those of all encoders in a row."""
        return self.text.ids_shape

    def tokenize(self, prompts):
        """Returns int32 "B L" token ids, see `text.tokenize`."""
        return tokenize(self.tokenizers, self.text, prompts, self.path)

    def with_tokenizer(self, tokenizer):
        """Raises UserError: there are no textual inversions."""
        raise UserError(f"{self.path} {self.no_words}")

    def gate(self, share):
        """Raises UserError, unless a family has one."""
        raise UserError(
            f"{self.path}: method=gift_gate needs a UNet or Stable Diffusion 3.5's "
            "transformer; use method=gift or gift_adversarial"
        )

    @classmethod
    def read_adapters(cls, fields, root, variant=""):
        """Returns what files change of a folder, see `sd.adapters.read_adapters`.

        Raises: UserError for a textual inversion, too.
        """
        if fields.textual_inversion:
            raise UserError(f"{root} {cls.no_words}")
        return adapters.read_adapters(fields, root, variant)


def clip_length(clips: Sequence[Any], tokenizers: Sequence[Any]) -> int:
    """Returns how many tokens of a prompt the CLIPs read.

    Args: tokenizers: the model's; none of a model of shapes alone.
    Source: diffusers `StableDiffusion3Pipeline.__init__`, `FluxPipeline.__init__`.
    """
    lengths = [clip.config.max_position_embeddings for clip in clips]
    lengths += [tokenizer.model_max_length for tokenizer in tokenizers[:1]]
    return min(lengths)


def check_shift(read: Parts, root: Any) -> None:
    """Raises UserError for a VAE whose latents PyTorch's pipeline cannot shift."""
    if read.configs["vae"].get("shift_factor") is None:
        file = root / "vae" / "config.json" if root else "vae/config.json"
        raise UserError(
            f"{file}: shift_factor is None, which PyTorch's pipeline cannot add to "
            "latents; must be a number: 0 for none"
        )
