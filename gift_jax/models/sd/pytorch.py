# SPDX-License-Identifier: Apache-2.0
"""A model as PyTorch's diffusers and transformers load it, checked against its files.

No other module imports PyTorch, and this one only where a function needs it.
"""

import contextlib
import importlib.metadata
import importlib.util
import inspect
import logging as std_logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gift_jax.models import safetensors_io, weights
from gift_jax.models.folder import class_names, pipeline
from gift_jax.models.kinds import KINDS, kind_of
from gift_jax.models.sd.adapters import SDXL_NAMES
from gift_jax.models.sd.lora_files import Layer
from gift_jax.models.tokenizer import vector_names
from gift_jax.runtime.errors import (
    UserError,
    VerificationError,
    install_command,
    one_line,
    shown,
)

_NEEDED = ("torch", "diffusers")
_PREFIX = "text_model."  # which transformers 5 drops from a text encoder's names
_LORA_ERROR = 2e-3  # of an update's largest value: the rounding of half precision


# --- the libraries --------------------------------------------------------------------


def is_installed() -> bool:
    """Whether PyTorch and diffusers are there; imports neither."""
    return all(importlib.util.find_spec(name) for name in _NEEDED)


def check_installed(what: str, *, lora: bool = False) -> None:
    """Raises UserError if a library is missing.

    Args: what: needs them. lora: peft, too.
    """
    needed = (*_NEEDED, "peft") if lora else _NEEDED
    missing = [name for name in needed if not importlib.util.find_spec(name)]
    if missing:
        are = "are" if len(missing) > 1 else "is"
        raise UserError(
            f"{what} needs PyTorch, and {' and '.join(missing)} {are} not installed; "
            + install_command("torch")
        )


def versions() -> str:
    """Returns the versions of the libraries that load models, in words."""
    names = "diffusers", "transformers"
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it the libraries warn of nothing and show no progress.

    Raises: UserError if one of them cannot be imported.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import transformers

            level = transformers.logging.get_verbosity()
            transformers.logging.set_verbosity_error()  # diffusers' import warns, too
            import diffusers
        except (ImportError, OSError, RuntimeError) as error:
            raise UserError(
                f"diffusers cannot be imported ({_in_one_line(error)}); "
                + install_command("torch")
            ) from error
        own = diffusers.utils.logging
        theirs = own.get_verbosity()
        bars = transformers.logging, own
        shown_bars = [log.is_progress_bar_enabled() for log in bars]
        own.set_verbosity(std_logging.CRITICAL)
        for log in bars:
            log.disable_progress_bar()
        try:
            yield
        finally:
            transformers.logging.set_verbosity(level)
            own.set_verbosity(theirs)
            for log, is_shown in zip(bars, shown_bars, strict=True):
                if is_shown:
                    log.enable_progress_bar()


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Turns whatever a library raises into a VerificationError."""
    try:
        yield
    except Exception as error:
        raise VerificationError(
            f"{what} ({versions()}): {type(error).__name__}: {_in_one_line(error)}"
        ) from error


def _in_one_line(error: Exception) -> str:
    return one_line(" ".join(str(error).split()))


# --- the model ------------------------------------------------------------------------


def load(
    root: Path,
    variant: str = "",
    single_file: Path | None = None,
    *,
    as_float32: bool = False,
) -> Any:
    """Returns PyTorch's pipeline of a model folder, each tensor compared with its file.

    As `from_pretrained` gives it without an argument, but for the safety checker, which
    is left out, and the variant.

    Args: single_file: the file that the folder was made from, in place of which
      `from_single_file` reads it. as_float32: ask for that dtype, whatever the configs
      name.
    Raises: VerificationError naming the first tensor that is missing, unexpected or
      another, or what the libraries say.
    """
    import torch  # noqa: TID251 - of an optional extra

    cls = _text_to_image(root)
    options: dict[str, Any] = {"variant": variant} if variant else {}
    if as_float32:
        options["torch_dtype"] = torch.float32
    options |= dict.fromkeys(_left_out(root))
    with _naming(f"PyTorch does not load {single_file or root}"):
        if single_file:
            pipe = cls.from_single_file(
                str(single_file), config=str(root), local_files_only=True, **options
            )
        else:
            pipe = cls.from_pretrained(str(root), **options)
    pipe.set_progress_bar_config(disable=True)
    if hasattr(pipe, "watermark"):
        pipe.watermark = None  # which changes pixels, where its library is there
    _check_dtypes(pipe, root)
    for component in weights.components(root):
        _check_tensors(getattr(pipe, component), root / component, variant)
    return pipe


def _text_to_image(root: Path) -> Any:
    """Returns diffusers' pipeline that draws from text alone with a folder's model."""
    import diffusers

    name = pipeline(root) or "StableDiffusionPipeline"
    return getattr(diffusers, re.sub("(Img2Img|Inpaint)Pipeline$", "Pipeline", name))


def _left_out(root: Path) -> list[str]:
    """Returns the components that a pipeline is to be told that it has not.

    The safety checker, and those that model_index.json says are none.
    """
    names = class_names(root)
    index = safetensors_io.read_json(root / "model_index.json")
    none = [name for name in weights.TEXT_ENCODERS if name in index.keys() - names]
    none += [name.replace("text_encoder", "tokenizer") for name in none]
    return none + ["safety_checker"] * ("safety_checker" in names)


def _check_dtypes(pipe: Any, root: Path) -> None:
    dtypes = {
        component: str(getattr(pipe, component).dtype).removeprefix("torch.")
        for component in weights.components(root)
    }
    denoiser = weights.denoiser_of(root)
    expected = dtypes[denoiser]
    misfits = [name for name in dtypes if dtypes[name] != expected]
    if misfits:
        name = misfits[0]
        raise VerificationError(
            f"{root}: PyTorch loads {name} in {dtypes[name]}, but the {denoiser} in "
            f"{expected}, which stops a pipeline; have dtype or torch_dtype of "
            f"{name}/config.json name {expected}, as an export has it"
        )


def _check_tensors(module: Any, directory: Path, variant: str) -> None:
    """Raises VerificationError unless a module has the tensors of its files, no other.

    Raises: UserError too, if files and config.json do not fit together.
    """
    state = {_plain(name): tensor for name, tensor in module.state_dict().items()}
    kind = kind_of(directory.parent, directory.name)
    entries = weights.entries_by_path(directory, kind, variant)
    in_files = {
        _plain(safetensors_io.torch_name(path)): entry
        for path, entry in entries.items()
    }
    for names, trouble in (
        (in_files.keys() - state.keys(), "PyTorch's {} has no place for"),
        (state.keys() - in_files.keys(), "PyTorch's {} finds no tensor for"),
    ):
        names -= {*KINDS[kind].unread}  # the same tensor by another name
        names = sorted(name for name in names if not name.endswith("position_ids"))
        if names:
            raise VerificationError(
                f"{directory}: {trouble.format(type(module).__name__)} {len(names)} "
                f"tensors, e.g. {one_line(names[0])} ({versions()})"
            )
    for name, (stored, entry) in in_files.items():
        ours = np.asarray(safetensors_io.read_tensor(stored, entry), np.float32)
        theirs = _to_numpy(state[name])
        # very old VAEs keep matrices as 1x1 convolutions
        if ours.size != theirs.size or not np.array_equal(
            ours.reshape(theirs.shape), theirs, equal_nan=True
        ):
            raise VerificationError(
                f"{entry.file}: {one_line(stored)} is {list(ours.shape)} of other "
                f"values than PyTorch loads ({list(theirs.shape)}, {versions()})"
            )


def _plain(name: str) -> str:
    return name.removeprefix(_PREFIX)


def _to_numpy(tensor: Any) -> np.ndarray:
    return tensor.detach().float().numpy()


# --- files that are added -------------------------------------------------------------


def add_loras(
    pipe: Any, files: Sequence[tuple[Path, float]], layers: Sequence[Sequence[Layer]]
) -> None:
    """Adds LoRA files to a pipeline, each with its scale.

    Args: layers: of each file, as they are read here.
    Raises: VerificationError naming the first tensor that diffusers drops, or the first
      module whose update is another.
    """
    names = [f"lora_{i}" for i in range(len(files))]
    for name, (file, _), of_file in zip(names, files, layers, strict=True):
        with _naming(f"diffusers does not read {file}"):
            pipe.load_lora_weights(
                str(file.parent), weight_name=file.name, adapter_name=name
            )
        _check_updates(pipe, name, file, of_file)
    if names:
        with _naming(f"diffusers does not scale {files[0][0]}"):
            pipe.set_adapters(names, [scale for _, scale in files])


def _check_updates(pipe: Any, name: str, file: Path, layers: Sequence[Layer]) -> None:
    parts = {
        (component, _plain(path)): part
        for component in (*weights.DENOISERS, *weights.TEXT_ENCODERS)
        if getattr(pipe, component, None) is not None
        for path, part in getattr(pipe, component).named_modules()
        if name in getattr(part, "lora_A", ())
    }
    of_file = {(layer.component, _plain(layer.module)): layer for layer in layers}
    dropped = [layer for key, layer in of_file.items() if key not in parts]
    if dropped:
        raise VerificationError(
            f"{file}: diffusers drops the tensors of {len(dropped)} of {len(layers)} "
            f"layers, e.g. {one_line(dropped[0].down[0])} ({versions()}); gift-jax "
            "convert rename-lora writes names that it reads"
        )
    for key, part in parts.items():
        theirs = _to_numpy(part.get_delta_weight(name))
        theirs = theirs.reshape(len(theirs), -1)
        ours = of_file[key].update() if key in of_file else np.zeros_like(theirs)
        error = np.abs(ours - theirs).max()
        if not error <= _LORA_ERROR * np.abs(ours).max():
            raise VerificationError(
                f"{file}: diffusers' update of {'.'.join(key)} is {error:.2g} off, of "
                f"values up to {np.abs(ours).max():.2g} ({versions()}); do its layers "
                "differ in alpha / rank?"
            )


def add_words(
    pipe: Any,
    files: Sequence[tuple[Path, str]],
    words: Mapping[str, Mapping[str, np.ndarray]],
) -> None:
    """Adds learned embeddings to a pipeline.

    Args: words: {token: {path of a token table: float32 "N D"}} of each file, in order,
      as they are read here.
    Raises: VerificationError naming the first token that has other vectors.
    """
    for (file, _), (token, rows) in zip(files, words.items(), strict=True):
        with _naming(f"diffusers does not read {file}"):
            _load_words(pipe, file, token, several=len(rows) > 1)
        for i, vectors in enumerate(rows.values()):
            end = f"_{i + 1}" if i else ""
            tokenizer = getattr(pipe, f"tokenizer{end}")
            table = getattr(pipe, f"text_encoder{end}").get_input_embeddings().weight
            ids = tokenizer.convert_tokens_to_ids(vector_names(token, len(vectors)))
            if max(ids) >= len(table) or not np.array_equal(
                _to_numpy(table[ids]), vectors
            ):
                raise VerificationError(
                    f"{file}: diffusers reads other vectors of {shown(token)} than the "
                    f"{len(vectors)} in the file ({versions()})"
                )


def _load_words(pipe: Any, file: Path, token: str, *, several: bool) -> None:
    if not several:
        pipe.load_textual_inversion(str(file), token=token, use_safetensors=True)
        return
    from safetensors.torch import load_file

    tensors = load_file(file)
    for name, end in zip(SDXL_NAMES, ("", "_2"), strict=True):
        pipe.load_textual_inversion(
            tensors[name],
            token=token,
            text_encoder=getattr(pipe, f"text_encoder{end}"),
            tokenizer=getattr(pipe, f"tokenizer{end}"),
        )


# --- a picture ------------------------------------------------------------------------


def draw(
    pipe: Any,
    root: Path,
    prompt: str,
    z_CHW: np.ndarray,
    sides: tuple[int, int],
    *,
    steps: int,
    guidance: float,
    with_ddim: bool,
) -> np.ndarray:
    """Returns a picture, float32 "H W 3" in [0, 1].

    Args: root: the pipeline's folder. z_CHW: initial noise. sides: (H, W), pixels.
      guidance: of the classifier-free one; what a distilled model reads is left at the
      pipeline's default. with_ddim: in place of the folder's own scheduler.
    """
    import torch  # noqa: TID251 - of an optional extra

    with _naming(f"PyTorch does not draw with {root}"):
        if with_ddim:
            import diffusers

            ddim = diffusers.DDIMScheduler.from_pretrained(
                str(root), subfolder="scheduler"
            )
            # anew, since a pipeline corrects the options of its scheduler
            parts = pipe.components | {"scheduler": ddim}
            pipe = type(pipe).from_pretrained(str(root), **parts)
            pipe.set_progress_bar_config(disable=True)
            pipe.watermark = None
        latents, options = torch.tensor(z_CHW[None]), {"guidance_scale": guidance}
        if "true_cfg_scale" in inspect.signature(pipe.__call__).parameters:
            options = {"true_cfg_scale": guidance, "negative_prompt": ""}
            latents = pipe._pack_latents(latents, 1, *z_CHW.shape)
        images = pipe(
            prompt,
            num_inference_steps=steps,
            latents=latents,
            **options,
            height=sides[0],
            width=sides[1],
            output_type="np",
        ).images
    return np.asarray(images[0], np.float32)
