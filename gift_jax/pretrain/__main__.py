# SPDX-License-Identifier: Apache-2.0
"""Makes the embedded model emoji-sd from the embedded images.

    python -m gift_jax.pretrain --config configs/emoji_pretrain.py --workdir RUN

Stages, each resumed where it was stopped: tokenizer; CLIP; VAE; the VAE's decoder,
trained on; UNet, on the latents of the one and the text states of the other. The result
is RUN/emoji-sd (a diffusers folder) and RUN/judge (the CLIP).
"""

from gift_jax.pretrain import stages
from gift_jax.runtime import cli


def main(argv: list[str] | None = None) -> int:
    cfg, workdir = cli.parse(argv, __doc__, "pretrain")
    stages.run(cfg, workdir)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
