# SPDX-License-Identifier: Apache-2.0
"""Makes the embedded models from the embedded images.

    python -m gift_jax.pretrain --config configs/emoji_pretrain.py --workdir RUN
    python -m gift_jax.pretrain --config configs/emoji_flow_pretrain.py --workdir RUN

emoji-sd, in stages, each resumed where it was stopped: tokenizer; CLIP; VAE; the VAE's
decoder, trained on; UNet, on the latents of the one and the text states of the other.
The result is RUN/emoji-sd (a diffusers folder) and RUN/judge (the CLIP).

emoji-flow, in one stage: a transformer of flow matching on emoji-sd's latents and text.
The result is RUN/emoji-flow.
"""

from gift_jax.pretrain import flow, stages
from gift_jax.runtime import cli


def main(argv: list[str] | None = None) -> int:
    cfg, workdir = cli.parse(argv, __doc__, "pretrain")
    run = flow.run if "flow" in cfg else stages.run
    run(cfg, workdir)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
