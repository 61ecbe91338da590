# SPDX-License-Identifier: Apache-2.0
"""The parts of a diffusers folder, read and checked: where every family's load begins.

A family says what its folders hold, a `Layout`; it puts the `Parts` together.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gift_jax.models import kinds, safetensors_io, weight_files, weights
from gift_jax.models.folder import class_names, existing, read_scheduler
from gift_jax.models.kinds import KINDS
from gift_jax.models.params import parameter_shapes
from gift_jax.models.tokenizer import load_tokenizer
from gift_jax.runtime.errors import UserError, shown


class TokenizerKind(NamedTuple):
    """A kind of tokenizer: the classes that have it, and how its folder is read."""

    classes: tuple[str, ...]
    load: Callable[[Path], Any]


CLIP_TOKENIZER = TokenizerKind(("CLIPTokenizer", "CLIPTokenizerFast"), load_tokenizer)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a family's folders hold.

    Attributes: label: what such a model is called, in errors. components: {name: its
      class in model_index.json} of what is read, the denoiser's first. tokenizers:
      {name: its kind}, a text encoder's each. others: names of components that draw
      nothing, or are read elsewhere.
    """

    label: str
    components: Mapping[str, str]
    tokenizers: Mapping[str, TokenizerKind]
    others: tuple[str, ...] = ("scheduler", "safety_checker", "feature_extractor")

    @property
    def denoiser(self) -> str:
        """The name of the component that is the denoiser."""
        return next(iter(self.components))

    def check(self, names: Mapping[str, str], file: Path) -> None:
        """Raises UserError unless a folder's components are these, all of them.

        Args: names: of `folder.class_names`. file: model_index.json, for errors.
        """
        for name, expected in self.components.items():
            if names.get(name) != expected:
                raise UserError(
                    f"{file}: {name} is {names.get(name)}; must be {expected}"
                )
        for name, kind in self.tokenizers.items():
            if names.get(name) not in kind.classes:
                raise UserError(
                    f"{file}: {name} is {names.get(name)}; must be {kind.classes[0]}"
                )
        known = {*self.components, *self.tokenizers, *self.others}
        for name in sorted(names.keys() - known):
            raise UserError(
                f"{file}: has the component {shown(name)}, which no {self.label} has; "
                "such models are not supported"
            )


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a folder holds, or would hold: of an `abstract` model shapes and no words.

    Attributes: modules, params: {component: its Flax module, its nested parameters}.
      configs: {component: its config.json's dict}, "scheduler" among them. tokenizers:
      of transformers, in the layout's order.
    """

    modules: dict[str, Any]
    params: dict[str, Any]
    configs: dict[str, Any]
    tokenizers: tuple[Any, ...] = ()


def read(path: Any, layout: Layout, dtype: Any, variant: str = "") -> Parts:
    """Returns the parts of a local diffusers folder, the parameters on the device.

    Never more than one tensor beside the parts themselves is in memory.

    Args: dtype: of parameters and computation. variant: "" reads the plain files,
      "fp16" those of that variant, where a component has them.
    Raises: UserError naming the file, if one is missing, malformed or not of the
      layout, or if the denoiser has no files of the variant.
    """
    root, denoiser = existing(path), layout.denoiser
    layout.check(class_names(root), root / "model_index.json")
    if variant and not weight_files.has_variant(
        root / denoiser, KINDS[denoiser].stem, variant
    ):
        raise UserError(f"{root / denoiser}: has no files of variant {variant!r}")
    modules, params, configs = {}, {}, {}
    for name, cls in layout.components.items():
        kind = kinds.of_class(cls)
        config = kinds.read_config(root / name, kind)
        modules[name], params[name], configs[name] = weights.load_component(
            root / name,
            kind,
            _dtype_of(kind, config, dtype),
            variant=variant,
            place=jnp.asarray,
        )
    configs["scheduler"] = read_scheduler(root)
    tokenizers = tuple(
        kind.load(root / name) for name, kind in layout.tokenizers.items()
    )
    return Parts(modules, params, configs, tokenizers)


def read_configs(path: Any, layout: Layout) -> dict[str, Any]:
    """Returns what `abstract` takes, of a folder that may lack its weights."""
    root = existing(path)
    configs = {
        name: kinds.effective(
            kinds.of_class(cls), safetensors_io.read_json(root / name / "config.json")
        )
        for name, cls in layout.components.items()
    }
    return configs | {"scheduler": read_scheduler(root)}


def abstract(configs: Mapping[str, Any], layout: Layout, dtype: Any) -> Parts:
    """Returns parts without files: parameters are shapes, and there is no tokenizer.

    Args: configs: the config.json dicts of the components, and scheduler's; those of
      the layout are taken, as far as they are there. dtype: see `read`.
    Raises: UserError for configs that `read` would not take.
    """
    modules, params = {}, {}
    for name, cls in layout.components.items():
        if name not in configs:
            continue
        kind = kinds.of_class(cls)
        kinds.check_config(kind, configs[name], f"{name}/config.json")
        dtype_of = _dtype_of(kind, configs[name], jnp.dtype(dtype))
        modules[name] = KINDS[kind].build(configs[name], dtype_of)
        params[name] = jax.tree.map(
            lambda a, dtype=dtype_of: jax.ShapeDtypeStruct(a.shape, dtype),
            parameter_shapes(modules[name]),
        )
    return Parts(modules, params, dict(configs))


def _dtype_of(kind, config, dtype):
    """Returns the dtype that a component is computed in: float32 if its config asks."""
    is_upcast = kind == "vae" and config.get("force_upcast") is True
    return jnp.dtype(jnp.float32) if is_upcast else dtype


# --- what every family checks ---------------------------------------------------------


def side_at(resolution: int, factor: int, multiple: int, reason: str) -> int:
    """Returns the latents' side at a resolution in pixels, square.

    Args: factor: pixels a latent, along a side. multiple: of which the latents' sides
      must be; reason: why, as a relative clause ("which this model halves in size").
    Raises: UserError for a resolution that does not divide so.
    """
    step = factor * multiple
    if resolution < 0 or resolution % step:
        fix = max(1, round(resolution / step)) * step
        raise UserError(
            f"resolution={resolution} must be a multiple of {step}, {reason}; try {fix}"
        )
    return resolution // factor


def check_channels(parts: Parts, component: str, root: Any) -> None:
    """Raises UserError unless the denoiser reads and returns the VAE's latents."""
    module, channels = parts.modules[component], parts.modules["vae"].latent_channels
    latents = module.in_channels, module.out_channels
    if latents != (channels, channels):
        raise UserError(
            f"{root}: vae latent_channels={channels}, but {component} in and out "
            f"channels are {latents}; they must be equal"
        )
