# SPDX-License-Identifier: Apache-2.0
"""FLUX.1-dev and FLUX.1-schnell as a model family: what a folder becomes."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from gift_jax.models import flow_schedule, parts
from gift_jax.models.base import Family
from gift_jax.models.flux import architectures, trainable
from gift_jax.models.flux.text import T5_LENGTH, TextEncoders
from gift_jax.models.flux.transformer import CAPTURE_KINDS, PACK
from gift_jax.models.folder import existing
from gift_jax.models.mmdit.model import TransformerModel, check_shift, clip_length
from gift_jax.models.mmdit.stable_diffusion_3 import T5_TOKENIZER
from gift_jax.models.parts import CLIP_TOKENIZER, Layout, Parts
from gift_jax.runtime.errors import UserError

_LAYOUT = Layout(
    "FLUX.1",
    {
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
    },
    {"tokenizer": CLIP_TOKENIZER, "tokenizer_2": T5_TOKENIZER},
    ("scheduler", "feature_extractor", "image_encoder"),
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Flux1(TransformerModel):
    """A loaded model of the transformer, VAE, CLIP and T5.

    Attributes: see `TransformerModel`. scheduler_config: with how many tokens an image
      has, by which its pipeline shifts.
    """

    text: TextEncoders

    no_words = "is a FLUX.1, for which textual inversions are not supported; use LoRA"
    trainable_sets = trainable.TRAINABLE_SETS
    layer_kinds = tuple(CAPTURE_KINDS)
    lora_targets = trainable.LORA_TARGETS
    partition_rules = trainable.PARTITION_RULES


def load(path, dtype=jnp.float32, *, variant="", resolution=0):
    """Returns the Flux1 in a local diffusers folder.

    Args: see `stable_diffusion_3.load`; a resolution of 0 is the VAE's sample_size.
    Raises: UserError naming the file, if one is missing, malformed or unsupported, or
      if the model cannot work at that resolution.
    """
    root = existing(path)
    read = parts.read(root, _LAYOUT, jnp.dtype(dtype), variant)
    return _build(root, read, resolution).replace(variant=variant)


def abstract_model(configs, dtype=jnp.float32, resolution=0):
    """Returns a Flux1 of shapes alone; UserError for what `load` would not take."""
    return _build(None, parts.abstract(configs, _LAYOUT, dtype), resolution)


def _build(root, read: Parts, resolution) -> Flux1:
    """Returns the Flux1 of these parts, which are checked to fit."""
    transformer, vae, *encoders = (read.modules[name] for name in _LAYOUT.components)
    clip, t5 = (module.config for module in encoders)
    channels = vae.latent_channels
    for part, size, field in (
        (f"vae latent_channels={channels}, packed", channels * PACK**2, "in_channels"),
        ("text_encoder hidden_size", clip.hidden_size, "pooled_projection_dim"),
        ("text_encoder_2 d_model", t5.d_model, "joint_attention_dim"),
    ):
        if size != getattr(transformer, field):
            raise UserError(
                f"{root}: {part}={size}, but transformer {field}="
                f"{getattr(transformer, field)}; they must be equal"
            )
    check_shift(read, root)
    length = clip_length(encoders[:1], read.tokenizers)
    text = TextEncoders(tuple(encoders), (length, T5_LENGTH))
    factor = 2 ** (len(vae.block_out_channels) - 1)
    pixels = resolution or int(np.max(vae.sample_size))
    side = parts.side_at(pixels, factor, PACK, "as 2x2 latents are a token")
    scheduler = read.configs["scheduler"] | {flow_schedule.TOKENS: (side // PACK) ** 2}
    flow_schedule.check(scheduler, f"{root}/scheduler/scheduler_config.json")
    return Flux1(
        path=root,
        module=transformer,
        vae=vae,
        text=text,
        tokenizers=read.tokenizers,
        params=read.params,
        scheduler_config=scheduler,
        latent_shape=(channels, side, side),
        factor=factor,
        scaling_factor=vae.scaling_factor,
        shift_factor=vae.shift_factor,
    )


FAMILY = Family(
    pipelines=("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    published=architectures.MODELS,
    load=load,
    read_configs=lambda path: parts.read_configs(path, _LAYOUT),
    abstract_model=abstract_model,
    read_adapters=Flux1.read_adapters,
    trainable_sets=trainable.TRAINABLE_SETS,
)
