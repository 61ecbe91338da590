# SPDX-License-Identifier: Apache-2.0
"""The contract of a model family: one folder beside this file.

A family owns its modules, the names of its weights, its conditioning, its noise process
and what trains, gets LoRA updates and lies where on a mesh. Defenses, attacks and
metrics see a model through this protocol alone.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from gift_jax.diffusion import Denoiser, NoiseProcess
from gift_jax.models.autoencoder import Autoencoder, LatentScale
from gift_jax.models.ops.kernels import Kernels

Flat = dict[str, jax.Array]
# {name: float32 "B ..."}: "states", "B L D", of Stable Diffusion; of SDXL also "pooled"
# and, of images, "sizes"
Cond = dict[str, Any]

# (pattern of a path, whether the parameter trains) ...; the first that matches decides
TrainableRules = Sequence[tuple[str, bool]]
# (pattern of a path, the mesh axes of its last dimensions) ...
PartitionRules = Sequence[tuple[str, tuple[str, ...]]]


@dataclasses.dataclass(frozen=True)
class Split:
    """A network's flat parameters in two: float32 to train, compute dtype to keep."""

    trainable: Flat
    frozen: Flat


@dataclasses.dataclass(frozen=True)
class Family:
    """What `models.load` asks of a model family.

    Attributes: pipelines: classes in model_index.json whose folders are its own.
      published: {hub id: its components' configs}, for what needs no files.
      load: (folder, dtype, *, variant, resolution) -> the model. read_configs: folder
      -> its components' configs and the scheduler's. abstract_model: (such configs,
      dtype, resolution) -> the model, its parameters shapes. read_adapters: (the files
      that are named, folder, variant) -> what they change. trainable_sets: see `Model`.
    """

    pipelines: tuple[str, ...]
    published: Mapping[str, Mapping[str, Any]]
    load: Callable[..., Any]
    read_configs: Callable[[Path], dict[str, Any]]
    abstract_model: Callable[..., Any]
    read_adapters: Callable[..., Any]
    trainable_sets: Mapping[str, TrainableRules]


class Gate(Protocol):
    """A detector of noised latents that lies inside the denoiser and closes it.

    Attributes: closed_distance: mean square from an open gate's output, from which on
      an output is taken for a closed one's.
    """

    closed_distance: float

    def init(self, key: jax.Array) -> Flat:
        """Returns the detector's parameters at their start, flat, float32."""
        ...

    def logits(self, params: Flat, z_t_BCHW: jax.Array) -> jax.Array:
        """Returns float32 "B": how sure it is; no text and no timestep is read."""
        ...

    def install(
        self, params: Flat, network: Flat, threshold: float
    ) -> tuple[Flat, dict[str, np.ndarray]]:
        """Returns (the denoiser's parameters with it, bool arrays of what it owns)."""
        ...


class Model(Protocol):
    """A loaded model.

    Attributes:
      path: its diffusers folder, or None for a model of shapes alone.
      params: {component: nested parameters}. denoiser_component: the denoiser's name,
        "unet" or "transformer"; denoiser_label: in words; denoiser_params: of `params`.
      latent_shape: (C, H, W) of one image's latents. image_size: pixels, square.
      noise: the process that the denoiser is trained on.
      denoiser: the network with that process; holds no parameters. network: its
        forward pass, with `with_cond(params, cond)`: (z_t, t) -> output, for samplers.
        dtype: that it is computed in. kernels: how its layers are.
      autoencoder, latent_scale: scaled latents to images, pure; see
        models/autoencoder.py. vae_params: its nested parameters.
      scheduler_config: the folder's scheduler/scheduler_config.json, and what its
        pipeline reads beside it.
      trainable_sets: name -> rules. layer_kinds: kinds of layers whose hidden states
        can be captured. lora_targets: pattern of the kernels' paths, whose
        one group names the projection. partition_rules: where parameters lie.
      tokenizer: of transformers, the first text encoder's. text_components: of
        `params`, that encode text.
      encode_ids: ({text component: nested parameters}, token ids) -> cond; pure.
      ids_shape: of one prompt's token ids: (L,), or of E text encoders (E, L).
      folder: its files, read without loading it; see models/folder.py.
    """

    path: Path | None
    params: dict[str, Any]
    denoiser_component: str
    denoiser_label: str
    denoiser_params: Any
    latent_shape: tuple[int, int, int]
    image_size: int
    noise: NoiseProcess
    denoiser: Denoiser
    network: Any
    dtype: Any
    kernels: Kernels
    autoencoder: Autoencoder
    latent_scale: LatentScale
    vae_params: Any
    scheduler_config: Mapping[str, Any]
    trainable_sets: Mapping[str, TrainableRules]
    layer_kinds: tuple[str, ...]
    lora_targets: str
    partition_rules: PartitionRules
    tokenizer: Any
    text_components: tuple[str, ...]
    encode_ids: Callable[[Any, jax.Array], Cond]
    ids_shape: tuple[int, ...]
    folder: Any

    def with_kernels(self, kernels: Kernels) -> "Model":
        """Returns the model with its denoiser's layers computed so."""
        ...

    def with_tokenizer(self, tokenizer: Any) -> "Model":
        """Returns the model with a tokenizer of more words, its text modules as large.

        The text parameters are still the old ones, as many rows short.
        """
        ...

    def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
        """Returns int32 "B ..." token ids, padded and cut to the model's length."""

    def encode_text(self, prompts: Sequence[str]) -> Cond:
        """Returns the conditioning of prompts; "" is the unconditional one."""

    def image_cond(self, frames_N4: np.ndarray) -> Cond:
        """Returns what joins the conditioning of images beside their prompts'; or {}.

        Args: frames_N4: int, the images' height and width before they were resized, and
          what was cut off above and to the left.
        """
        ...

    def encode_images(self, images_BHWC: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Returns (mean, std) of the posterior over scaled latents, "B C h w".

        Args: images_BHWC: float32 in [-1, 1].
        """

    def decode(self, z_BCHW: np.ndarray) -> np.ndarray:
        """Returns float32 "B H W 3", about [-1, 1], of scaled latents."""

    def trainable_paths(self, trainable_set: str) -> tuple[str, ...]:
        """Returns the paths of the denoiser's parameters that are in a trainable set.

        Every family has "all": what trains in PyTorch if everything does.
        """
        ...

    def split(self, trainable_set: str) -> Split:
        """Returns the denoiser's parameters divided by a trainable set."""

    def gate(self, share: float) -> Gate:
        """Returns a gate that owns this share of some layers' channels.

        Raises: UserError for a model that can have none.
        """
        ...

    def float32_params(self, component: str, paths: Iterable[str]) -> Flat:
        """Returns some of a component's parameters in float32, as they are on disk."""

    def updated(self, changed: Mapping[str, np.ndarray]) -> "Model":
        """Returns the model with parameters replaced, in its compute dtype."""
