# SPDX-License-Identifier: Apache-2.0
"""One Stable Diffusion in JAX: load a diffusers folder, encode, decode, its noise.

SD 1.x and 2.x have one text encoder; SDXL has two, whose states lie side by side, and
its UNet also reads their pooled text and the sizes of an image.
"""

import copy
import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from gift_jax.diffusion import Ddpm, Denoiser
from gift_jax.models import kinds, safetensors_io, sd, weight_files, weights
from gift_jax.models.base import Split
from gift_jax.models.folder import ModelFolder, class_names, existing, pipeline
from gift_jax.models.kinds import KINDS
from gift_jax.models.ops.kernels import Kernels
from gift_jax.models.params import parameter_shapes
from gift_jax.models.sd import scheduler_config
from gift_jax.models.sd.gate import Gate
from gift_jax.models.sd.network import Network
from gift_jax.models.sd.scheduler_config import alphas_cumprod
from gift_jax.models.sd.text import TextEncoders, tokenize
from gift_jax.models.tokenizer import load_tokenizer
from gift_jax.models.trainable import TRAINABLE_SETS, select_trainable
from gift_jax.runtime.errors import UserError, shown

LORA_TARGETS = r"/attn[12]/(to_q|to_k|to_v|to_out_0)/kernel$"
PARTITION_RULES = (  # of a parameter's path: the axes of its last dimensions
    (r"(to_[qkv]|net_0/proj|[qkv]_proj|fc1)/kernel", ("fsdp", "tensor")),
    (r"(to_out_0|net_2|fc2|out_proj)/kernel", ("tensor", "fsdp")),
    (r"(kernel|embedding)", ("fsdp",)),
)
_XL = "StableDiffusionXL"
PIPELINES = (  # whose folders these are: _class_name in model_index.json
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    f"{_XL}Pipeline",
    f"{_XL}Img2ImgPipeline",
    f"{_XL}InpaintPipeline",
)
_CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
}
_XL_CLASSES = _CLASSES | {"text_encoder_2": "CLIPTextModelWithProjection"}
_OTHERS = ("tokenizer", "scheduler", "safety_checker", "feature_extractor")
_OTHERS += ("image_encoder",)  # components that draw nothing, or are read elsewhere


@dataclasses.dataclass(frozen=True, eq=False)
class StableDiffusion:
    """A loaded model; `params`: {component: nested dict}, of the UNet, VAE and text.

    tokenizers: of transformers, one for each text encoder, of the same words.
    latent_shape: (C, H, W) that it is used at. factor: pixels a latent, along a side.
    variant: of the files it was read from, "" for the plain ones. adapters: files that
    were added to it, see `sd.adapters`, or None.
    scheduler_config: the folder's scheduler/scheduler_config.json, of the class that
    model_index.json names.
    """

    path: Path
    unet: object
    vae: object
    text: TextEncoders
    tokenizers: tuple
    params: dict
    scheduler_config: dict
    latent_shape: tuple
    factor: int
    scaling_factor: float
    max_length: int
    variant: str = ""
    adapters: object = None

    trainable_sets = TRAINABLE_SETS
    lora_targets = LORA_TARGETS
    partition_rules = PARTITION_RULES

    @property
    def text_components(self):
        """The components of `params` that encode text."""
        return self.text.components

    @property
    def text_encoder(self):
        """The module of the first text encoder."""
        return self.text.modules[0]

    @property
    def tokenizer(self):
        """The first text encoder's; any other one's pads with another token alone."""
        return self.tokenizers[0]

    @property
    def prediction_type(self):
        """ "epsilon" or "v_prediction": what the UNet's output means."""
        return self.scheduler_config.get("prediction_type", "epsilon")

    @property
    def image_size(self):
        """Pixels of an image's side; UserError if its sides differ."""
        _, height, width = self.latent_shape
        if height != width:
            pixels = f"{height * self.factor}x{width * self.factor}"
            raise UserError(
                f"config.resolution=0: {self.path} draws {pixels} pixels, and pictures "
                "are read as squares; set config.resolution"
            )
        return height * self.factor

    def replace(self, **changes):
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def kernels(self) -> Kernels:
        """How the UNet's layers are computed."""
        return self.unet.kernels

    def with_kernels(self, kernels: Kernels):
        """Returns the model with its UNet's layers computed so."""
        return self.replace(unet=self.unet.clone(kernels=kernels))

    @property
    def folder(self):
        """Its files, read without loading the model."""
        return ModelFolder(self.path, self.variant, self.adapters)

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
    def denoiser(self):
        """The UNet with its noise process; holds no parameters."""
        return Denoiser(self.network.predict, self.noise)

    @property
    def encode_ids(self):
        """({component: nested text parameters}, int32 ids) -> cond; pure."""
        return self.text.encode

    @property
    def ids_shape(self):
        """The shape of a prompt's token ids: (L,), or (E, L) of several encoders."""
        count = len(self.text.modules)
        return (self.max_length,) if count == 1 else (count, self.max_length)

    def tokenize(self, prompts):
        """Returns int32 "B L" or "B E L" token ids, see `text.tokenize`."""
        fields = self.tokenizers, self.text, self.max_length
        return tokenize(*fields, prompts, self.path)

    def encode_text(self, prompts):
        """Returns cond, see `encode_prompts`."""
        return encode_prompts(self, prompts)

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

    def encode_images(self, images_BHWC):
        """Returns (mean, std), see the function `encode_images`."""
        return encode_images(self, images_BHWC)

    def split(self, trainable_set):
        """Returns the UNet's parameters divided by a name of `trainable_sets`."""
        trainable, frozen = select_trainable(self.params["unet"], trainable_set)
        trainable = self.float32_params("unet", trainable)
        count = sum(a.size for a in trainable.values())
        total = count + sum(a.size for a in frozen.values())
        logging.info("training %.3f M of %.3f M parameters", count / 1e6, total / 1e6)
        return Split(trainable, frozen)

    def gate(self, share):
        """Returns the UNet's `Gate`; UserError for a UNet that can have none."""
        return Gate(self.unet, share)

    def float32_params(self, component, paths):
        """Returns some of a component's parameters in float32, as they are on disk."""
        paths = set(paths)
        if self.path is None or jnp.dtype(self.unet.dtype) == jnp.float32:
            flat = flatten_dict(self.params[component], sep="/")
            flat = {path: flat[path] for path in flat if path in paths}
            return {path: a.astype(jnp.float32) for path, a in flat.items()}
        params = self.folder.float32_params(component, paths)
        return jax.tree.map(jnp.asarray, params)

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

    def with_adapters(self, adapters):
        """Returns the model with added files merged into its parameters."""
        model = self.replace(adapters=adapters)
        tokenizer = model.folder.added_tokenizer()
        model = model.with_tokenizer(tokenizer) if tokenizer else model
        return model.updated(model.folder.adapted_params())

    def updated(self, changed):
        """Returns the model with parameters replaced, {Flax path: array}."""
        params, dtype = dict(self.params), self.unet.dtype
        for component, arrays in weights.by_component(changed).items():
            if arrays:
                flat = flatten_dict(params[component], sep="/")
                flat |= {path: jnp.asarray(a, dtype) for path, a in arrays.items()}
                params[component] = unflatten_dict(flat, sep="/")
        return self.replace(params=params)

    @property
    def jitted(self):
        """The compiled pieces: encode_text, encode_image, decode; params come first."""
        return _jitted(self.text, self.vae)


@functools.lru_cache(maxsize=8)
def _jitted(text, vae):
    """One set of programs for all models of the same modules."""
    return {
        "encode_text": jax.jit(text.encode),
        "encode_image": jax.jit(functools.partial(_encode_image, vae)),
        "decode": jax.jit(functools.partial(_decode, vae)),
    }


def load(path, dtype=jnp.float32, *, variant="", resolution=0):
    """Returns the StableDiffusion in a local diffusers folder.

    SD 1.x and 2.x; never more than one tensor beside the model itself is in memory.

    Args: path: the folder that holds model_index.json. dtype: of parameters and
      computation. variant: "" reads the plain files, "fp16" those of that variant,
      where a component has them. resolution: pixels, square; 0 is the model's own.
    Raises: UserError naming the file, if one is missing, malformed or unsupported, or
      if the model cannot work at that resolution.
    """
    root, dtype = existing(path), jnp.dtype(dtype)
    classes = _classes(pipeline(root))
    _check_classes(class_names(root), classes, root / "model_index.json")
    if variant and not weight_files.has_variant(
        root / "unet", KINDS["unet"].stem, variant
    ):
        raise UserError(f"{root / 'unet'}: has no files of variant {variant!r}")
    modules, params, configs = {}, {}, {}
    for kind in classes:
        config = kinds.read_config(root / kind, kind)
        modules[kind], params[kind], configs[kind] = weights.load_component(
            root / kind,
            kind,
            _dtype_of(kind, config, dtype),
            variant=variant,
            place=jnp.asarray,
        )
    configs["scheduler"] = read_scheduler(root)
    tokenizers = tuple(
        load_tokenizer(root / name)
        for name in ("tokenizer", "tokenizer_2")[: len(classes) - 2]
    )
    index = safetensors_io.read_json(root / "model_index.json")
    model = _build(
        root,
        configs,
        modules,
        params,
        tokenizers,
        resolution,
        has_zeros=bool(index.get("force_zeros_for_empty_prompt", len(tokenizers) > 1)),
    )
    return model.replace(variant=variant)


def _classes(name):
    """Returns {component: its class} of a pipeline's class; "": of an SD 1.x or 2.x."""
    return _XL_CLASSES if name.startswith(_XL) else _CLASSES


def _dtype_of(kind, config, dtype):
    """Returns the dtype that a component is computed in: float32 if its config asks."""
    is_upcast = kind == "vae" and config.get("force_upcast") is True
    return jnp.dtype(jnp.float32) if is_upcast else dtype


def _check_classes(names, classes, file):
    """Raises UserError unless a folder's components are Stable Diffusion's, all."""
    if classes is _XL_CLASSES and "text_encoder" not in names:
        raise UserError(
            f"{file}: has no text_encoder; an SDXL refiner is not supported, name the "
            "folder of the base model"
        )
    for name, expected in classes.items():
        if names.get(name) != expected:
            raise UserError(f"{file}: {name} is {names.get(name)}; must be {expected}")
    tokenizers = ("tokenizer", "tokenizer_2")[: len(classes) - 2]
    for name in tokenizers:
        if names.get(name) not in ("CLIPTokenizer", "CLIPTokenizerFast"):
            raise UserError(
                f"{file}: {name} is {names.get(name)}; must be CLIPTokenizer"
            )
    for name in sorted(names.keys() - classes.keys() - set(_OTHERS + tokenizers)):
        count = "one text encoder" if classes is _CLASSES else "two text encoders"
        raise UserError(
            f"{file}: has the component {shown(name)}, which no Stable Diffusion of "
            f"{count} has; such models are not supported"
        )


def _build(root, configs, modules, params, tokenizers, resolution, has_zeros=False):
    """Returns the StableDiffusion of these parts, which are checked to fit."""
    scheduler_config.check(
        configs["scheduler"], f"{root}/scheduler/scheduler_config.json"
    )
    text = TextEncoders(
        tuple(modules[name] for name in weights.TEXT_ENCODERS if name in modules)
    )
    _check_widths(modules, text, root)
    longest = text.max_length
    if tokenizers:
        longest = min(longest, *(t.model_max_length for t in tokenizers))
    if has_zeros and len(tokenizers) > 1:
        text = dataclasses.replace(text, end_id=tokenizers[0].eos_token_id)
    factor = 2 ** (len(modules["vae"].block_out_channels) - 1)
    size = _latent_size(configs["unet"], modules["unet"], factor, resolution, root)
    return StableDiffusion(
        path=root,
        unet=modules["unet"],
        vae=modules["vae"],
        text=text,
        tokenizers=tokenizers,
        params=params,
        scheduler_config=configs["scheduler"],
        latent_shape=(modules["unet"].in_channels, *size),
        factor=factor,
        scaling_factor=modules["vae"].scaling_factor,
        max_length=longest,
    )


def abstract_model(configs, dtype=jnp.float32, resolution=0):
    """Returns a StableDiffusion without weights or files: its parameters are shapes.

    For programs that are compiled and not run; it has no path and no tokenizers.

    Args: configs: the config.json dicts of the components, and scheduler's.
      dtype, resolution: see `load`.
    Raises: UserError for configs that `load` would not take.
    """
    dtype = jnp.dtype(dtype)
    classes = [kind for kind in _XL_CLASSES if kind in configs]
    modules, params = {}, {}
    for kind in classes:
        kinds.check_config(kind, configs[kind], f"{kind}/config.json")
        dtype_of = _dtype_of(kind, configs[kind], dtype)
        modules[kind] = KINDS[kind].build(configs[kind], dtype_of)
        params[kind] = jax.tree.map(
            lambda a, dtype=dtype_of: jax.ShapeDtypeStruct(a.shape, dtype),
            parameter_shapes(modules[kind]),
        )
    return _build(None, configs, modules, params, (), resolution)


def read_configs(root):
    """Returns what `abstract_model` takes, of a folder that may lack its weights."""
    root = existing(root)
    configs = {
        kind: kinds.effective(
            kind, safetensors_io.read_json(root / kind / "config.json")
        )
        for kind in _classes(pipeline(root))
    }
    file = root / "scheduler" / "scheduler_config.json"
    return configs | {"scheduler": safetensors_io.read_json(file)}


def read_scheduler(root):
    """Returns a folder's scheduler_config.json, of the class that diffusers loads."""
    root = existing(root)
    config = safetensors_io.read_json(root / "scheduler" / "scheduler_config.json")
    loaded = class_names(root).get("scheduler")
    if loaded is None:
        return config
    written = config.get("_class_name", loaded)
    if written != loaded:
        logging.info(
            "scheduler: %s, as model_index.json says; its file is of %s",
            loaded,
            written,
        )
    return config | {"_class_name": loaded}


def _latent_size(config, unet, factor, resolution, root):
    """Returns the latents' (H, W) for a resolution in pixels; 0 is the UNet's own.

    Source: diffusers `StableDiffusionPipeline.__init__`, which has models older than
      its 0.9 draw at 64, whatever less their config says; SDXL's has 128.
    """
    halvings = 2 ** (len(unet.block_out_channels) - 1)
    if not resolution:
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
    step = factor * halvings
    if resolution < 0 or resolution % step:
        fix = max(1, round(resolution / step)) * step
        raise UserError(
            f"resolution={resolution} must be a multiple of {step}, which this model "
            f"halves in size; try {fix}"
        )
    return resolution // factor, resolution // factor


def _is_older(config, version):
    """Whether a diffusers before `version`, (major, minor), wrote a config."""
    writer = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version", "")))
    return bool(writer) and tuple(map(int, writer.groups())) < version


def _check_widths(modules, text, root):
    unet = modules["unet"]
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
    channels = modules["vae"].latent_channels
    latents = modules["unet"].in_channels, modules["unet"].out_channels
    if latents != (channels, channels):
        raise UserError(
            f"{root}: vae latent_channels={channels}, but unet in and out channels are "
            f"{latents}; they must be equal"
        )


def _encode_image(vae, params, x_BHWC):
    x_BCHW = jnp.transpose(x_BHWC, (0, 3, 1, 2))
    mean, logvar = sd.apply_vae_encode(vae, params, x_BCHW.astype(vae.dtype))
    return mean.astype(jnp.float32), jnp.exp(0.5 * logvar.astype(jnp.float32))


def _decode(vae, params, z_BCHW):
    x_BCHW = sd.apply_vae_decode(vae, params, z_BCHW.astype(vae.dtype))
    return jnp.transpose(x_BCHW, (0, 2, 3, 1)).astype(jnp.float32)


def _in_batches(fn, array, batch_size):
    """Applies a jitted fn to the leading axis in few distinct sizes: powers of two."""
    outputs = []
    for start in range(0, len(array), batch_size):
        part = array[start : start + batch_size]
        size = min(batch_size, 1 << (len(part) - 1).bit_length())
        pad = [(0, size - len(part))] + [(0, 0)] * (array.ndim - 1)
        out = fn(np.pad(part, pad))
        n = len(part)
        outputs.append(jax.tree.map(lambda a, n=n: a[:n], out))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)


def encode_prompts(model, prompts, batch_size=32):
    """Returns the prompts' conditioning, float32 "B ...", see `TextEncoders.encode`.

    Args: prompts: list of str; "" is the unconditional prompt. Padding is attended to.
    """
    if not prompts:
        raise UserError("prompts is empty; give at least one")
    params = {name: model.params[name] for name in model.text_components}
    encode = functools.partial(model.jitted["encode_text"], params)
    return _in_batches(encode, model.tokenize(prompts), batch_size)


def encode_images(model, images_BHWC, batch_size=8):
    """Returns (mean, std) of the posterior over latents, float32 "B C h w", VAE-scaled.

    Args: images_BHWC: float32 "B H W 3" in [-1, 1]; H and W multiples of the VAE's
      factor.
    Raises: UserError for another shape.
    """
    images_BHWC = np.asarray(images_BHWC, np.float32)
    factor = model.factor
    if images_BHWC.ndim != 4 or images_BHWC.shape[-1] != 3 or not len(images_BHWC):
        raise UserError(f"images have shape {images_BHWC.shape}; must be (B, H, W, 3)")
    if images_BHWC.shape[1] % factor or images_BHWC.shape[2] % factor:
        raise UserError(
            f"images are {images_BHWC.shape[1]}x{images_BHWC.shape[2]}; "
            f"both sides must be multiples of {factor}"
        )
    encode = functools.partial(model.jitted["encode_image"], model.params["vae"])
    mean, std = _in_batches(encode, images_BHWC, batch_size)
    return mean * model.scaling_factor, std * model.scaling_factor


def decode_latents(model, z_BCHW, batch_size=8):
    """Returns float32 "B H W 3", about [-1, 1], of VAE-scaled latents "B C h w"."""
    decode = functools.partial(model.jitted["decode"], model.params["vae"])
    z_BCHW = np.asarray(z_BCHW, np.float32) / np.float32(model.scaling_factor)
    return _in_batches(decode, z_BCHW, batch_size)


def noise_schedule(model):
    """Returns alphas_cumprod, float32 "T", of the model's own scheduler config."""
    return jnp.asarray(alphas_cumprod(model.scheduler_config), jnp.float32)
