# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 1.x, 2.x and XL as a model family: what a folder becomes.

SD 1.x and 2.x have one text encoder; SDXL has two, whose states lie side by side, and
its UNet also reads their pooled text and the sizes of an image.
"""

import copy
import dataclasses
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from gift_jax.diffusion import Ddpm
from gift_jax.models import parts, safetensors_io, weights
from gift_jax.models.base import Family
from gift_jax.models.folder import class_names, existing, pipeline
from gift_jax.models.latent_diffusion import LatentDiffusion
from gift_jax.models.parts import CLIP_TOKENIZER, Layout, Parts
from gift_jax.models.sd import architectures, scheduler_config
from gift_jax.models.sd.adapters import read_adapters
from gift_jax.models.sd.gate import Gate
from gift_jax.models.sd.network import Network
from gift_jax.models.sd.scheduler_config import alphas_cumprod
from gift_jax.models.sd.text import TextEncoders, tokenize
from gift_jax.models.sd.unet import CAPTURE_KINDS
from gift_jax.models.trainable import TRAINABLE_SETS
from gift_jax.runtime.errors import UserError, shown

LORA_TARGETS = r"/attn[12]/(to_q|to_k|to_v|to_out_0)/kernel$"
PARTITION_RULES = (  # of a parameter's path: the axes of its last dimensions
    (r"(to_[qkv]|net_0/proj|[qkv]_proj|fc1)/kernel", ("fsdp", "tensor")),
    (r"(to_out_0|net_2|fc2|out_proj)/kernel", ("tensor", "fsdp")),
    (r"(kernel|embedding)", ("fsdp",)),
)
_XL = "StableDiffusionXL"
_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    f"{_XL}Pipeline",
    f"{_XL}Img2ImgPipeline",
    f"{_XL}InpaintPipeline",
)
_OTHERS = ("scheduler", "safety_checker", "feature_extractor", "image_encoder")
_ONE = Layout(
    "Stable Diffusion of one text encoder",
    {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
    },
    {"tokenizer": CLIP_TOKENIZER},
    _OTHERS,
)
_TWO = Layout(
    "Stable Diffusion of two text encoders",
    {**_ONE.components, "text_encoder_2": "CLIPTextModelWithProjection"},
    {"tokenizer": CLIP_TOKENIZER, "tokenizer_2": CLIP_TOKENIZER},
    _OTHERS,
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class StableDiffusion(LatentDiffusion):
    """A loaded model of the UNet, VAE and one or two text encoders.

    Attributes: max_length: tokens of a prompt. See `LatentDiffusion` for the others;
      tokenizers: of the same words. scheduler_config: of the class that
      model_index.json names.
    """

    text: TextEncoders
    max_length: int

    denoiser_component = "unet"
    trainable_sets = TRAINABLE_SETS
    layer_kinds = tuple(CAPTURE_KINDS)
    lora_targets = LORA_TARGETS
    partition_rules = PARTITION_RULES

    @property
    def unet(self):
        """The denoiser's module."""
        return self.module

    @property
    def text_encoder(self):
        """The module of the first text encoder."""
        return self.text.modules[0]

    @property
    def prediction_type(self):
        """ "epsilon" or "v_prediction": what the UNet's output means."""
        return self.scheduler_config.get("prediction_type", "epsilon")

    @property
    def noise(self):
        """The noise process that it is trained on."""
        abar_T = np.asarray(alphas_cumprod(self.scheduler_config), np.float32)
        return Ddpm(abar_T, self.prediction_type)

    @property
    def network(self):
        """The UNet's forward pass."""
        return Network(self.unet, self.factor)

    @property
    def ids_shape(self):
        """The shape of a prompt's token ids: (L,), or (E, L) of several encoders."""
        count = len(self.text.modules)
        return (self.max_length,) if count == 1 else (count, self.max_length)

    def tokenize(self, prompts):
        """Returns int32 "B L" or "B E L" token ids, see `text.tokenize`."""
        fields = self.tokenizers, self.text, self.max_length
        return tokenize(*fields, prompts, self.path)

    def image_cond(self, frames_N4):
        """Returns what the UNet is told of images beside their prompts, "N ..." each.

        Args: frames_N4: int, see `data.images.read_framed`.
        Source: diffusers examples/text_to_image/train_text_to_image_sdxl.py,
          compute_time_ids.
        """
        if not self.unet.addition_embed_type:
            return {}
        sides = [side * self.factor for side in self.latent_shape[1:]]
        target = np.broadcast_to(np.asarray(sides), (len(frames_N4), 2))
        sizes = np.concatenate([frames_N4, target], axis=1)
        return {"sizes": sizes.astype(np.float32)}

    def gate(self, share):
        """Returns the UNet's `Gate`; UserError for a UNet that can have none."""
        return Gate(self.unet, share)

    def with_tokenizer(self, tokenizer):
        """Returns the model with a tokenizer of more words, its text modules as large.

        The text parameters are still the old ones, as many rows short.
        """
        added = list(tokenizer.get_added_vocab().items())
        words = [word for word, _ in sorted(added, key=lambda item: item[1])]
        others = [copy.deepcopy(other) for other in self.tokenizers[1:]]
        for other in others:
            known = other.get_vocab()
            other.add_tokens([word for word in words if word not in known])
        return self.replace(
            tokenizers=(tokenizer, *others), text=self.text.resized(len(tokenizer))
        )


def load(path, dtype=jnp.float32, *, variant="", resolution=0):
    """Returns the StableDiffusion in a local diffusers folder.

    Args: path: the folder that holds model_index.json. dtype, variant: see
      `parts.read`. resolution: pixels, square; 0 is the model's own.
    Raises: UserError naming the file, if one is missing, malformed or unsupported, or
      if the model cannot work at that resolution.
    """
    root = existing(path)
    layout, file = _layout(root), root / "model_index.json"
    if layout is _TWO and "text_encoder" not in class_names(root):
        raise UserError(
            f"{file}: has no text_encoder; an SDXL refiner is not supported, name the "
            "folder of the base model"
        )
    read = parts.read(root, layout, jnp.dtype(dtype), variant)
    has_zeros = safetensors_io.read_json(file).get(
        "force_zeros_for_empty_prompt", layout is _TWO
    )
    model = _build(root, read, resolution, has_zeros=bool(has_zeros))
    return model.replace(variant=variant)


def abstract_model(configs, dtype=jnp.float32, resolution=0):
    """Returns a StableDiffusion without weights or files: its parameters are shapes.

    For programs that are compiled and not run; it has no path and no tokenizers.

    Args: configs: the config.json dicts of the components, and scheduler's.
      dtype, resolution: see `load`.
    Raises: UserError for configs that `load` would not take.
    """
    return _build(None, parts.abstract(configs, _TWO, dtype), resolution)


def read_configs(path):
    """Returns what `abstract_model` takes, of a folder that may lack its weights."""
    return parts.read_configs(path, _layout(existing(path)))


def _layout(root) -> Layout:
    """Returns what a folder holds; without a pipeline's class that of an SD 1 or 2."""
    return _TWO if pipeline(root).startswith(_XL) else _ONE


def _build(root, read: Parts, resolution, has_zeros=False) -> StableDiffusion:
    """Returns the StableDiffusion of these parts, which are checked to fit."""
    modules, tokenizers = read.modules, read.tokenizers
    scheduler = read.configs["scheduler"]
    scheduler_config.check(scheduler, f"{root}/scheduler/scheduler_config.json")
    text = TextEncoders(
        tuple(modules[name] for name in weights.TEXT_ENCODERS if name in modules)
    )
    shift = modules["vae"].shift_factor
    if shift:  # which PyTorch's pipelines do not read
        file = root / "vae" / "config.json" if root else "vae/config.json"
        raise UserError(
            f"{file}: shift_factor={shift} is not supported; must be None or 0"
        )
    _check_widths(modules["unet"], text, root)
    parts.check_channels(read, "unet", root)
    longest = text.max_length
    if tokenizers:
        longest = min(longest, *(t.model_max_length for t in tokenizers))
    if has_zeros and len(tokenizers) > 1:
        text = dataclasses.replace(text, end_id=tokenizers[0].eos_token_id)
    factor = 2 ** (len(modules["vae"].block_out_channels) - 1)
    sides = _latent_sides(
        read.configs["unet"], modules["unet"], factor, resolution, root
    )
    return StableDiffusion(
        path=root,
        module=modules["unet"],
        vae=modules["vae"],
        text=text,
        tokenizers=tokenizers,
        params=read.params,
        scheduler_config=scheduler,
        latent_shape=(modules["unet"].in_channels, *sides),
        factor=factor,
        scaling_factor=modules["vae"].scaling_factor,
        max_length=longest,
    )


def _latent_sides(config, unet, factor, resolution, root) -> tuple[Any, Any]:
    """Returns the latents' (H, W) for a resolution in pixels; 0 is the UNet's own.

    Source: diffusers `StableDiffusionPipeline.__init__`, which has models older than
      its 0.9 draw at 64, whatever less their config says; SDXL's has 128.
    """
    halvings = 2 ** (len(unet.block_out_channels) - 1)
    if resolution:
        reason = "which this model halves in size"
        side = parts.side_at(resolution, factor, halvings, reason)
        return side, side
    size = unet.sample_size or (128 if unet.addition_embed_type else 64)
    if isinstance(size, int) and size < 64 and _is_older(config, (0, 9)):
        size = 64
    sides = size if isinstance(size, tuple) else (size, size)
    if any(side % halvings for side in sides):
        raise UserError(
            f"{root}: unet sample_size={shown(size)}; must be a multiple of "
            f"{halvings}, since the UNet halves it; set the resolution"
        )
    return sides


def _is_older(config, version):
    """Whether a diffusers before `version`, (major, minor), wrote a config."""
    writer = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version", "")))
    return bool(writer) and tuple(map(int, writer.groups())) < version


def _check_widths(unet, text, root):
    """Raises UserError unless the UNet reads what the text encoders give."""
    widths = [module.config.hidden_size for module in text.modules]
    if sum(widths) != unet.cross_attention_dim:
        names = " + ".join(f"{name} hidden_size" for name in text.components)
        raise UserError(
            f"{root}: {names}={sum(widths)}, but unet cross_attention_dim="
            f"{unet.cross_attention_dim}; they must be equal"
        )
    pooled = 0
    if len(widths) > 1:
        pooled = text.modules[-1].config.projection_dim
    if pooled != unet.pooled_width:
        raise UserError(
            f"{root}: text_encoder_2 projection_dim={pooled}, but the unet reads "
            f"{unet.pooled_width} pooled values; they must be equal"
        )


FAMILY = Family(
    pipelines=_PIPELINES,
    published={name: architectures.MODELS[m] for name, m in architectures.IDS.items()},
    load=load,
    read_configs=read_configs,
    abstract_model=abstract_model,
    read_adapters=read_adapters,
    trainable_sets=TRAINABLE_SETS,
)
