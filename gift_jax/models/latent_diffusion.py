# SPDX-License-Identifier: Apache-2.0
"""What the models of every family do alike: encode, decode, divide, change.

`LatentDiffusion` has it for a denoiser, a VAE and text encoders of any architecture;
the contract that it and a family's class fulfill together is `models.base.Model`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax.traverse_util import flatten_dict, unflatten_dict

from gift_jax.diffusion import Denoiser, NoiseProcess
from gift_jax.models import weights
from gift_jax.models.autoencoder import Autoencoder, LatentScale
from gift_jax.models.base import (
    Cond,
    Flat,
    Gate,
    PartitionRules,
    Split,
    TrainableRules,
)
from gift_jax.models.batching import map_powers_of_two
from gift_jax.models.folder import ModelFolder
from gift_jax.models.ops.kernels import Kernels
from gift_jax.models.trainable import select_trainable
from gift_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LatentDiffusion:
    """A loaded model.

    A family's class adds its `network`, `noise`, tokens and gate, and names its rules.

    Attributes: path: its diffusers folder, or None. module, vae: the denoiser's and the
      VAE's Flax modules. text: what encodes prompts; hashable, with `components` and
      `encode`, see `sd.text.TextEncoders`. tokenizers: of transformers, one for each
      text encoder. params: {component: nested}. latent_shape: (C, H, W) that it is used
      at. factor: pixels a latent, along a side. scaling_factor, shift_factor: see
      `autoencoder.LatentScale`. variant: of the files it was read from, "" for the
      plain ones. adapters: files that were added to it, or None.
    """

    path: Path | None
    module: Any
    vae: Any
    text: Any
    tokenizers: tuple[Any, ...]
    params: dict[str, Any]
    scheduler_config: Mapping[str, Any]
    latent_shape: tuple[int, int, int]
    factor: int
    scaling_factor: float
    shift_factor: float = 0.0
    variant: str = ""
    adapters: Any = None

    denoiser_component: ClassVar[str]
    trainable_sets: ClassVar[Mapping[str, TrainableRules]]
    layer_kinds: ClassVar[tuple[str, ...]]
    lora_targets: ClassVar[str]
    partition_rules: ClassVar[PartitionRules]

    # --- a family's own ---------------------------------------------------------------

    @property
    def network(self) -> Any:
        """The denoiser's forward pass: hashable, with `predict` and `with_cond`."""
        raise NotImplementedError

    @property
    def noise(self) -> NoiseProcess:
        """The noise process that it is trained on."""
        raise NotImplementedError

    @property
    def ids_shape(self) -> tuple[int, ...]:
        """The shape of one prompt's token ids."""
        raise NotImplementedError

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Returns int32 "B ..." token ids, padded and cut to the model's length."""
        raise NotImplementedError

    def with_tokenizer(self, tokenizer: Any) -> Self:
        """Returns the model with a tokenizer of more words, its text modules as large.

        The text parameters are still the old ones, as many rows short.
        """
        raise NotImplementedError

    def image_cond(self, frames_N4: np.ndarray) -> Cond:
        """Returns what joins the conditioning of images; see `models.base.Model`."""
        return {}

    def gate(self, share: float) -> Gate:
        """Returns the denoiser's gate. Raises: UserError if it can have none."""
        raise NotImplementedError

    # --- its parts --------------------------------------------------------------------

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def denoiser_label(self) -> str:
        """What the denoiser is called in words."""
        return weights.DENOISERS[self.denoiser_component]

    @property
    def dtype(self) -> Any:
        """Of the denoiser's parameters and arithmetic."""
        return self.module.dtype

    @property
    def denoiser(self) -> Denoiser:
        """The network with its noise process; holds no parameters."""
        return Denoiser(self.network.predict, self.noise)

    @property
    def kernels(self) -> Kernels:
        """How the denoiser's layers are computed."""
        return self.module.kernels

    def with_kernels(self, kernels: Kernels) -> Self:
        """Returns the model with its denoiser's layers computed so."""
        return self.replace(module=self.module.clone(kernels=kernels))

    @property
    def folder(self) -> ModelFolder:
        """Its files, read without loading the model."""
        assert self.path, "a model of shapes alone has no folder"
        return ModelFolder(self.path, self.variant, self.adapters)

    @property
    def image_size(self) -> int:
        """Pixels of an image's side; UserError if its sides differ."""
        _, height, width = self.latent_shape
        if height != width:
            pixels = f"{height * self.factor}x{width * self.factor}"
            raise UserError(
                f"config.resolution=0: {self.path} draws {pixels} pixels, and pictures "
                "are read as squares; set config.resolution"
            )
        return height * self.factor

    # --- text -------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The first text encoder's."""
        return self.tokenizers[0]

    @property
    def text_components(self) -> tuple[str, ...]:
        """The components of `params` that encode text."""
        return self.text.components

    @property
    def encode_ids(self) -> Any:
        """({component: nested text parameters}, int32 ids) -> cond; pure."""
        return self.text.encode

    def encode_text(self, prompts: Sequence[str], batch_size: int = 32) -> Cond:
        """Returns the prompts' conditioning, float32 "B ...".

        Args: prompts: "" is the unconditional prompt. Padding is attended to.
        """
        if not prompts:
            raise UserError("prompts is empty; give at least one")
        params = {name: self.params[name] for name in self.text_components}
        encode = functools.partial(self.jitted["encode_text"], params)
        return map_powers_of_two(encode, self.tokenize(prompts), batch_size)

    # --- images -----------------------------------------------------------------------

    @property
    def autoencoder(self) -> Autoencoder:
        """The VAE's forward passes; holds no parameters."""
        return Autoencoder(self.vae)

    @property
    def vae_params(self) -> Any:
        """The VAE's nested parameters."""
        return self.params["vae"]

    @property
    def latent_scale(self) -> LatentScale:
        """What the denoiser's latents are of the VAE's."""
        shift = np.float32(self.shift_factor) if self.shift_factor else None
        return LatentScale(np.float32(self.scaling_factor), shift)

    def encode_images(
        self, images_BHWC: np.ndarray, batch_size: int = 8
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (mean, std) of the posterior over scaled latents, float32 "B C h w".

        Args: images_BHWC: float32 "B H W 3" in [-1, 1]; H and W multiples of the VAE's
          factor.
        Raises: UserError for another shape.
        """
        images_BHWC = np.asarray(images_BHWC, np.float32)
        shape, factor = images_BHWC.shape, self.factor
        if images_BHWC.ndim != 4 or shape[-1] != 3 or not len(images_BHWC):
            raise UserError(f"images have shape {shape}; must be (B, H, W, 3)")
        if shape[1] % factor or shape[2] % factor:
            raise UserError(
                f"images are {shape[1]}x{shape[2]}; both sides must be multiples of "
                f"{factor}"
            )
        encode = functools.partial(self.jitted["encode_image"], self.vae_params)
        mean, std = map_powers_of_two(encode, images_BHWC, batch_size)
        scale = self.latent_scale
        return scale.scaled(mean), std * scale.factor

    def decode(self, z_BCHW: np.ndarray, batch_size: int = 8) -> jax.Array:
        """Returns float32 "B H W 3", about [-1, 1], of scaled latents "B C h w"."""
        decode = functools.partial(self.jitted["decode"], self.vae_params)
        z_BCHW = self.latent_scale.unscaled(np.asarray(z_BCHW, np.float32))
        return map_powers_of_two(decode, z_BCHW, batch_size)

    @property
    def jitted(self) -> dict[str, Any]:
        """The compiled pieces: encode_text, encode_image, decode; params come first."""
        return _jitted(self.text, self.autoencoder)

    # --- the parameters ---------------------------------------------------------------

    @property
    def denoiser_params(self) -> Any:
        """The denoiser's nested parameters."""
        return self.params[self.denoiser_component]

    def trainable_paths(self, trainable_set: str) -> tuple[str, ...]:
        """Returns the paths of the denoiser's parameters that are in a trainable set.

        "all" leaves out what is on disk with the weights and is none in PyTorch.
        """
        return tuple(self._select(trainable_set)[0])

    def _select(self, trainable_set: str) -> tuple[Flat, Flat]:
        sets = self.trainable_sets
        return select_trainable(self.denoiser_params, trainable_set, sets)

    def split(self, trainable_set: str) -> Split:
        """Returns the denoiser's parameters divided by a name of `trainable_sets`."""
        trainable, frozen = self._select(trainable_set)
        trainable = self.float32_params(self.denoiser_component, trainable)
        count = sum(a.size for a in trainable.values())
        total = count + sum(a.size for a in frozen.values())
        logging.info("training %.3f M of %.3f M parameters", count / 1e6, total / 1e6)
        return Split(trainable, frozen)

    def float32_params(self, component: str, paths: Iterable[str]) -> Flat:
        """Returns some of a component's parameters in float32, as they are on disk."""
        paths = set(paths)
        if self.path is None or jnp.dtype(self.dtype) == jnp.float32:
            flat = flatten_dict(self.params[component], sep="/")
            flat = {path: flat[path] for path in flat if path in paths}
            return {path: a.astype(jnp.float32) for path, a in flat.items()}
        params = self.folder.float32_params(component, paths)
        return jax.tree.map(jnp.asarray, params)

    def updated(self, changed: Mapping[str, np.ndarray]) -> Self:
        """Returns the model with parameters replaced, {Flax path: array}."""
        params = dict(self.params)
        parts = weights.by_component(changed, self.denoiser_component)
        for component, arrays in parts.items():
            if arrays:
                flat = flatten_dict(params[component], sep="/")
                flat |= {p: jnp.asarray(a, self.dtype) for p, a in arrays.items()}
                params[component] = unflatten_dict(flat, sep="/")
        return self.replace(params=params)

    def with_adapters(self, adapters: Any) -> Self:
        """Returns the model with added files merged into its parameters."""
        model = self.replace(adapters=adapters)
        tokenizer = model.folder.added_tokenizer()
        model = model.with_tokenizer(tokenizer) if tokenizer else model
        return model.updated(model.folder.adapted_params())


@functools.lru_cache(maxsize=8)
def _jitted(text: Any, autoencoder: Autoencoder) -> dict[str, Any]:
    """One set of programs for all models of the same modules."""
    return {
        "encode_text": jax.jit(text.encode),
        "encode_image": jax.jit(autoencoder.encode),
        "decode": jax.jit(autoencoder.decode),
    }
