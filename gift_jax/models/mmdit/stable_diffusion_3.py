# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3 and 3.5 as a model family: what a folder becomes.

A folder may lack T5: the text is then zeros where T5's states would be, and the
transformer reads one of them, which counts as all.
"""

import dataclasses
import functools

import jax.numpy as jnp

from gift_jax.models import flow_schedule, parts
from gift_jax.models.base import Family
from gift_jax.models.folder import class_names, existing
from gift_jax.models.mmdit import architectures, gate
from gift_jax.models.mmdit.detector import Stream
from gift_jax.models.mmdit.model import TransformerModel, check_shift, clip_length
from gift_jax.models.mmdit.text import TextEncoders
from gift_jax.models.mmdit.tokenizer import load_t5_tokenizer
from gift_jax.models.mmdit.trainable import (
    LORA_TARGETS,
    PARTITION_RULES,
    TRAINABLE_SETS,
)
from gift_jax.models.mmdit.transformer import CAPTURE_KINDS, Transformer
from gift_jax.models.parts import CLIP_TOKENIZER, Layout, Parts, TokenizerKind
from gift_jax.runtime.errors import UserError

T5_TOKENIZER = TokenizerKind(("T5TokenizerFast", "T5Tokenizer"), load_t5_tokenizer)
_PIPELINES = (
    "StableDiffusion3Pipeline",
    "StableDiffusion3Img2ImgPipeline",
    "StableDiffusion3InpaintPipeline",
)
_CLIP = "CLIPTextModelWithProjection"
_OTHERS = ("scheduler", "feature_extractor", "image_encoder")
_WITHOUT_T5 = Layout(
    "Stable Diffusion 3 without text_encoder_3",
    {
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "text_encoder": _CLIP,
        "text_encoder_2": _CLIP,
    },
    {"tokenizer": CLIP_TOKENIZER, "tokenizer_2": CLIP_TOKENIZER},
    (*_OTHERS, "tokenizer_3"),
)
_WITH_T5 = Layout(
    "Stable Diffusion 3",
    {**_WITHOUT_T5.components, "text_encoder_3": "T5EncoderModel"},
    {**_WITHOUT_T5.tokenizers, "tokenizer_3": T5_TOKENIZER},
    _OTHERS,
)
_NO_WORDS = (
    "is a Stable Diffusion 3, for which diffusers loads no textual inversions; use LoRA"
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StableDiffusion3(TransformerModel):
    """A loaded model of the transformer, VAE, two CLIPs and maybe T5.

    Attributes: see `TransformerModel`.
    """

    text: TextEncoders

    no_words = _NO_WORDS
    trainable_sets = TRAINABLE_SETS
    layer_kinds = tuple(CAPTURE_KINDS)
    lora_targets = LORA_TARGETS
    partition_rules = PARTITION_RULES

    @functools.cached_property
    def stream(self) -> Stream:
        """What a gate's detector has to know of the transformer; measured once."""
        tokens = self.text.clip_length + self.text.t5_length
        if self.path is None:
            return Stream.nominal(self.module, tokens)
        return Stream.of(self.module, self.denoiser_params, tokens)

    def gate(self, share):
        """Returns the transformer's `Gate`; UserError for one that can have none."""
        return gate.of_model(self, share)


def load(path, dtype=jnp.float32, *, variant="", resolution=0):
    """Returns the StableDiffusion3 in a local diffusers folder.

    Args: path: the folder that holds model_index.json. dtype, variant: see
      `parts.read`. resolution: pixels, square; 0 is the model's own.
    Raises: UserError naming the file, if one is missing, malformed or unsupported, or
      if the model cannot work at that resolution.
    """
    root = existing(path)
    read = parts.read(root, _layout(root), jnp.dtype(dtype), variant)
    return _build(root, read, resolution).replace(variant=variant)


def abstract_model(configs, dtype=jnp.float32, resolution=0):
    """Returns a StableDiffusion3 without weights or files: its parameters are shapes.

    Args: see `sd.stable_diffusion.abstract_model`.
    Raises: UserError for configs that `load` would not take.
    """
    return _build(None, parts.abstract(configs, _WITH_T5, dtype), resolution)


def read_configs(path):
    """Returns what `abstract_model` takes, of a folder that may lack its weights."""
    return parts.read_configs(path, _layout(existing(path)))


def _layout(root) -> Layout:
    return _WITH_T5 if "text_encoder_3" in class_names(root) else _WITHOUT_T5


def _build(root, read: Parts, resolution) -> StableDiffusion3:
    """Returns the StableDiffusion3 of these parts, which are checked to fit."""
    modules, tokenizers = read.modules, read.tokenizers
    transformer, vae = modules["transformer"], modules["vae"]
    scheduler = read.configs["scheduler"]
    flow_schedule.check(scheduler, f"{root}/scheduler/scheduler_config.json")
    check_shift(read, root)
    text = _text_encoders(modules, tokenizers)
    text.check_fits(transformer, root)
    parts.check_channels(read, "transformer", root)
    factor = 2 ** (len(vae.block_out_channels) - 1)
    side = _latent_side(transformer, factor, resolution, root)
    return StableDiffusion3(
        path=root,
        module=transformer.clone(repeats=text.repeats),
        vae=vae,
        text=text,
        tokenizers=tokenizers,
        params=read.params,
        scheduler_config=scheduler,
        latent_shape=(transformer.in_channels, side, side),
        factor=factor,
        scaling_factor=vae.scaling_factor,
        shift_factor=vae.shift_factor,
    )


def _text_encoders(modules, tokenizers) -> TextEncoders:
    clips = modules["text_encoder"], modules["text_encoder_2"]
    return TextEncoders(
        clips,
        modules.get("text_encoder_3"),
        modules["transformer"].joint_attention_dim,
        clip_length(clips, tokenizers),
    )


def _latent_side(transformer: Transformer, factor, resolution, root) -> int:
    """Returns the latents' side for a resolution in pixels; 0 is the model's own."""
    patch, side = transformer.patch_size, transformer.sample_size
    if resolution:
        side = parts.side_at(resolution, factor, patch, "as a patch's side is")
    elif side % patch:
        raise UserError(
            f"{root}: transformer sample_size={side}; must be a multiple of "
            f"patch_size={patch}; set the resolution"
        )
    if side > transformer.max_side:
        asked = f"resolution={resolution}" if resolution else f"sample_size={side}"
        raise UserError(
            f"{root}: {asked} is above the {transformer.max_side * factor} pixels that "
            "the transformer's pos_embed_max_size has places for; set a lower "
            "resolution"
        )
    return side


FAMILY = Family(
    pipelines=_PIPELINES,
    published={name: architectures.MODELS[m] for name, m in architectures.IDS.items()},
    load=load,
    read_configs=read_configs,
    abstract_model=abstract_model,
    read_adapters=StableDiffusion3.read_adapters,
    trainable_sets=TRAINABLE_SETS,
)
