# SPDX-License-Identifier: Apache-2.0
"""LoRA files by the names of diffusers, old ones too, of peft and of kohya.

Of linear layers and of convolutions (LoCon). Source: diffusers 0.42,
loaders/lora_base.py and utils/state_dict_utils.py; peft 0.21, tuners/lora/layer.py.
Kohya's names are in `kohya`, peft's configs in `lora_configs`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gift_jax.models import safetensors_io, weights
from gift_jax.models.sd import kohya, lora_configs
from gift_jax.runtime import files
from gift_jax.runtime.errors import UserError, one_line, shown

NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
WRITTEN = ("diffusers", "kohya")  # whose names `write` knows
_PEFT = "base_model.model."
_OTHER_KINDS = {  # part of a tensor's name: what such a file is
    r"dora_scale|lora_magnitude_vector": "is of a DoRA, which is not supported",
    r"\.lokr_|\.hada_": "is of a LoKr or LoHa, which are not supported",
    r"\.lora_mid\.": "is of a LoCon in Tucker form, which is not supported",
    rf"^({'|'.join(kohya.COMPONENTS)})[^.]*(?!\.({'|'.join(kohya.HALVES)})\Z)(\.|\Z)": (
        "is of another kind of update than LoRA and LoCon, which is not supported"
    ),
}
_COMPONENTS = (*weights.DENOISERS, *weights.TEXT_ENCODERS)
_SAVED = {"unet": ("lora.down", "lora.up"), "transformer": ("lora_A", "lora_B")}
_OLD_UNET = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# component -> {name of a tensor: (Flax path, its shape in PyTorch)}
Targets = Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]]
Change = Callable[[np.ndarray], np.ndarray]


class _Half(NamedTuple):
    """One tensor of a file: of what module, and whether down (A), up (B) or alpha."""

    component: str
    module: str
    half: str


def saved_names(component: str, module: str) -> tuple[str, str]:
    """Returns the names of A and B of a module, as diffusers' scripts save them.

    Source: diffusers `StableDiffusionLoraLoaderMixin.save_lora_weights`,
      `SD3LoraLoaderMixin.save_lora_weights`.
    """
    down, up = _SAVED.get(component, ("lora_linear_layer.down", "lora_linear_layer.up"))
    return f"{component}.{module}.{down}.weight", f"{component}.{module}.{up}.weight"


def find(path: Path) -> Path:
    """Returns the LoRA file of a folder, or the file itself."""
    for name in NAMES if path.is_dir() else ():
        if (path / name).is_file():
            return path / name
    return path


class Layer(NamedTuple):
    """The update of one module: scale B A, not yet read.

    Attributes: path: Flax's, of the weight. down, up: (name, entry) of A and B.
      alpha: the file's own, or such that alpha / rank is its scale.
    """

    component: str
    module: str
    path: str
    down: tuple[str, safetensors_io.Entry]
    up: tuple[str, safetensors_io.Entry]
    alpha: float

    @property
    def rank(self) -> int:
        return self.down[1].shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (A "R I", B "O R"), of a convolution with its axes, float32."""
        A, B = (
            np.asarray(safetensors_io.read_tensor(*tensor), np.float32)
            for tensor in (self.down, self.up)
        )
        return A, B

    def update(self, scale: float = 1.0) -> np.ndarray:
        """Returns scale alpha / rank B A, float32 "O I", a convolution's axes in I."""
        A, B = self.factors()
        # a convolution's up is 1x1, so that it is a product too
        delta = B.reshape(len(B), -1) @ A.reshape(len(A), -1)
        return np.float32(scale * self.scale) * delta


def read(file: Path, targets: Targets, scale: float) -> dict[str, Change]:
    """Returns {Flax path: float32 W, as PyTorch lays it out -> W + scale B A}.

    scale: beside the file's own, alpha / rank. The factors are read when the change is
    made.

    Raises: UserError naming the file and its first tensor that does not fit.
    """
    layers = read_layers(file, targets)
    return {layer.path: _change(layer, scale) for layer in layers}


def read_layers(file: Path, targets: Targets) -> list[Layer]:
    """Returns a file's updates; all but the factors are read.

    Raises: UserError naming the file and its first tensor that does not fit.
    """
    entries = safetensors_io.read_header(file)
    _check_kind(file, entries)
    modules = _modules_by_kohya(targets)
    halves = {name: _parse(name, modules) for name in sorted(entries)}
    names: dict[_Half, str] = {}  # the first name of each
    for name, half in halves.items():
        if half:
            names.setdefault(half, name)
    misfits = {
        name: _misfit(name, half, names, entries, targets)
        for name, half in halves.items()
    }
    reasons = {name: reason for name, reason in misfits.items() if reason}
    made_for = kohya.made_for(safetensors_io.read_metadata(file))
    refuse_misfits(file, reasons, len(entries), made_for)
    configs = lora_configs.Configs(file, any(n.startswith(_PEFT) for n in entries))
    layers = []
    for (component, module, which), name in names.items():
        if which != "down":
            continue
        rank = entries[name].shape[0]
        up = names[_Half(component, module, "up")]
        of_kohya = names.get(_Half(component, module, "alpha"))
        if of_kohya:
            alpha = kohya.read_alpha(of_kohya, entries[of_kohya])
        else:
            prefix = component if name.startswith(f"{component}.") else ""
            alpha = rank * configs.scale(prefix, module, rank)
        path, _ = targets[component][f"{module}.weight"]
        pair = (name, entries[name]), (up, entries[up])
        layers.append(Layer(component, module, path, *pair, alpha))
    return layers


def refuse_misfits(
    file: Path, reasons: Mapping[str, str], count: int, made_for: str = ""
) -> None:
    """Raises UserError for tensors that a model has no place for.

    Args: reasons: of each such tensor. count: of all tensors of the file. made_for: the
      model that the file names, or "".
    """
    if not count:
        raise UserError(f"{one_line(file)}: has no tensors; copy it again")
    if reasons:
        name, hint = min(reasons), "is the file made for another model?"
        if made_for and reasons[name].startswith(("changes", "has shape")):
            hint = f"it says that it is made for {shown(made_for)}; use such a model"
        raise UserError(
            f"{one_line(file)}: {one_line(name)} {reasons[name]}; {len(reasons)} of "
            f"{count} tensors do not fit: {hint}"
        )


def _check_kind(file, names):
    for pattern, meaning in _OTHER_KINDS.items():
        for name in sorted(names):
            if re.search(pattern, name):
                raise UserError(f"{one_line(file)}: {one_line(name)} {meaning}")


def _modules_by_kohya(targets: Targets) -> dict[str, dict[str, str]]:
    """Returns {component: {its kohya name, without the start: module}}."""
    modules = {
        component: [name.removesuffix(".weight") for name in names]
        for component, names in targets.items()
    }
    return {c: kohya.modules_by_name(c, names) for c, names in modules.items()}


def _parse(name: str, modules: Mapping[str, Mapping[str, str]]) -> _Half | None:
    """Returns what a tensor's name says, or None if it is no name of a LoRA's.

    Args: modules: of `_modules_by_kohya`.
    """
    if prefix := kohya.prefix_of(name):
        layer, _, end = name.partition(".")
        component = kohya.COMPONENTS[prefix]
        module_of = modules.get(component, {})
        module = module_of.get(layer.removeprefix(prefix), layer)
        return _Half(component, module, kohya.HALVES[end])
    component, rest = _component(name.removeprefix(_PEFT), modules)
    rest = rest.replace(".processor.", ".")
    is_denoiser = component in weights.DENOISERS
    old = _OLD_UNET if is_denoiser else _OLD_TEXT
    rest = re.sub(
        r"\.(to_q|to_k|to_v|to_out)_lora\.(?=down|up)",
        lambda match: f".{old[match[1]]}.lora.",
        rest,
    )
    match = re.fullmatch(
        r"(.+)\.(?:lora_([AB])|lora(?:_linear_layer)?\.(down|up))\.weight", rest
    )
    if not match:
        return None
    module = match[1]
    # which has lost the prefix in transformers 5
    if not is_denoiser and module != "text_projection":
        module = "text_model." + module.removeprefix("text_model.")
    half = match[3] or {"A": "down", "B": "up"}[match[2]]
    return _Half(component, module, half)


def _component(name: str, components: Iterable[str]) -> tuple[str, str]:
    """Returns (component, the rest of a name); components: of the model."""
    for component in _COMPONENTS:
        if name.startswith(f"{component}."):
            return component, name.removeprefix(f"{component}.")
    if name.startswith(("text_model.", "encoder.layers.")):
        return "text_encoder", name
    return next(part for part in components if part in weights.DENOISERS), name


def _misfit(name, half, names, entries, targets):
    """Returns why a tensor has no place in the model, or ""."""
    if half is None:
        return "is no tensor of a LoRA by the names of diffusers, peft or kohya"
    if names[half] != name:
        return f"is there twice, also as {one_line(names[half])}"
    if half.component not in targets:
        return f"changes {half.component}, which this model does not have"
    target = targets[half.component].get(f"{half.module}.weight")
    if target is None or not target[0].endswith("/kernel"):
        return f"changes {one_line(half.module)}, which this model does not have"
    if half.half == "alpha":
        return _misfit_of_alpha(half, names, entries[name].shape)
    other = names.get(half._replace(half="up" if half.half == "down" else "down"))
    if other is None:
        return "has no other half"
    down, up = (name, other) if half.half == "down" else (other, name)
    out, *inner = target[1]
    A, B = entries[down].shape, entries[up].shape
    rank = A[0] if A else 0
    shapes = (rank, *inner), (out, rank, *[1] * len(inner[1:]))
    if not rank or shapes != (A, B):
        return (
            f"has shape {list(entries[name].shape)}, which gives no update of the "
            f"shape of {one_line(half.module)}, {list(target[1])}"
        )
    return ""


def _misfit_of_alpha(half, names, shape):
    if not {half._replace(half="down"), half._replace(half="up")} & names.keys():
        return "has no lora_down and lora_up beside it"
    return f"has shape {list(shape)}, not one number" if shape not in ((), (1,)) else ""


def _change(layer: Layer, scale: float) -> Change:
    return lambda W: W + layer.update(scale).reshape(W.shape)


def write(file: Path, layers: Sequence[Layer], by: str, dtype: str = "F32") -> None:
    """Writes updates as one file, by the names of diffusers or of kohya.

    diffusers' names have no alpha: its part of the scale is multiplied into B.

    Args: by: of `WRITTEN`. dtype: of the factors, of `safetensors_io.DTYPES`.
    Raises: UserError for a component that kohya's names here do not have.
    """
    table = {}
    others = {layer.component for layer in layers} - set(kohya.COMPONENTS.values())
    if by == "kohya" and others:
        raise UserError(
            f"names=kohya: there are none for a {min(others)}; write names=diffusers"
        )
    for layer in layers:
        for name, array in _written(layer, by).items():
            if not name.endswith(".alpha"):
                array = safetensors_io.cast(name, array, dtype)
            kind = "F32" if name.endswith(".alpha") else dtype
            table[name] = kind, array.shape, lambda array=array: array
    # the wider type first, so that every tensor begins at a multiple of its size
    table = dict(sorted(table.items(), key=lambda item: item[1][0] != "F32"))
    notes = {"format": "pt"}
    if by == "kohya":
        notes |= kohya.metadata((layer.rank, layer.alpha) for layer in layers)
    with files.atomic_write(file) as aside:
        safetensors_io.write_file(aside, table, notes)


def _written(layer: Layer, by: str) -> dict[str, np.ndarray]:
    A, B = layer.factors()
    if by == "kohya":
        return kohya.state(layer.component, layer.module, A, B, layer.alpha)
    name, halves = f"{layer.component}.{layer.module}", ("lora_A", "lora_B")
    if layer.component not in weights.DENOISERS:  # where that is read in part alone
        halves = ("lora_linear_layer.down", "lora_linear_layer.up")
    up = np.float32(layer.scale) * B
    return {f"{name}.{halves[0]}.weight": A, f"{name}.{halves[1]}.weight": up}
