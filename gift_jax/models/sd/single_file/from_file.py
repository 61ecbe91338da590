# SPDX-License-Identifier: Apache-2.0
"""A single file as a model folder, tensor for tensor."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import logging

from gift_jax.models import dtype_labels, safetensors_io
from gift_jax.models.safetensors_io import Entry
from gift_jax.models.sd import architectures
from gift_jax.models.sd.single_file import configs as single_configs
from gift_jax.models.sd.single_file import families, sources, tensors
from gift_jax.models.sd.single_file.configs import Configs
from gift_jax.models.sd.single_file.tensors import THIRDS, Tensor
from gift_jax.runtime import files
from gift_jax.runtime.errors import UserError, one_line

STEMS = {  # of the files of weights in a folder
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
_EMA = "model_ema."
_USELESS = re.compile(  # tensors of training, and constants
    r"model_ema\..*|(\w+_)?alphas_cumprod(_prev)?|betas|logvar"
    r"|posterior_.*|lvlb_weights|denoiser\.(log_)?sigmas|global_step|epoch"
    r"|optimizer_states?\b.*|lr_schedulers?\b.*|embedding_manager\..*"
    r"|(cond_stage_model|conditioner\.embedders\.0)\.transformer\.text_projection.*"
    r"|first_stage_model\.(loss|model_ema)\..*|.*\.(logit_scale|attn_mask|position_ids)"
    rf"|{families.V_KEY}|{families.ZERO_SNR_KEY}"
)
_OLD_CLIP = re.compile(
    r"((?:cond_stage_model|conditioner\.embedders\.0)\.transformer\.)"
    r"(embeddings\.|encoder\.|final_layer_norm\.)"
)
# name on disk -> (dtype, shape, function that returns the array)
Table = dict[str, tuple]


@dataclasses.dataclass(frozen=True)
class Options:
    """What a single file does not say.

    tokenizer: a folder or hub id of CLIP's tokenizer; "": see `sources`. vae: a folder
    or hub id whose VAE takes the place of the file's; "": its own. prediction: what the
    UNet predicts, "" if the file says it. ema: whether to take the averaged weights of
    the UNet. dtype: of `safetensors_io.DTYPES`, to cast every weight to, or None.
    """

    tokenizer: str = ""
    vae: str = ""
    prediction: str = ""
    ema: bool = False
    dtype: str | None = None


def convert(file: Path, out: Path, options: Options) -> None:
    """Writes a single file as a model folder, whole or not at all.

    One tensor is in memory at a time; each keeps its bytes and its dtype.

    Raises: UserError naming the file, the tensor or the field, before any weight is
      written.
    """
    model = SingleFile(file, options)
    published = architectures.MODELS[model.family.name]
    vae = sources.vae_folder(options.vae) if options.vae else None
    if vae:
        sources.check_vae(vae, model.family, model.configs["unet"]["in_channels"])
    rows = model.configs["text_encoder"]["vocab_size"]
    tokenizer = sources.tokenizer_folder(options.tokenizer, file, model.family, rows)
    with files.atomic_folder(out) as temp:
        for component, table in model.tables(options.dtype).items():
            folder = temp / component
            sources.write_json(folder / "config.json", model.configs[component])
            weights = folder / f"{STEMS[component]}.safetensors"
            safetensors_io.write_file(weights, table, {"format": "pt"})
            logging.info("%s: %d tensors", component, len(table))
        if vae:
            sources.copy_vae(vae, temp / "vae")
        pad = published["pad_token"]
        sources.write_tokenizer(tokenizer, temp / "tokenizer", pad)
        index = architectures.model_index
        if "text_encoder_2" in model.configs:
            pad = published["pad_token_2"]
            sources.write_tokenizer(tokenizer, temp / "tokenizer_2", pad)
            index = architectures.xl_model_index
        scheduler = model.configs["scheduler"]
        file_name = "scheduler/scheduler_config.json"
        sources.write_json(temp / file_name, scheduler)
        sources.write_json(temp / "model_index.json", index(scheduler["_class_name"]))
        dtype_labels.write(temp)


class SingleFile:
    """What a single file holds, from its header alone.

    Attributes: file: its path. family: of its tensors. configs: of the components of a
      model folder. tensors: component -> its tensors, all of which are there.
    Raises: UserError naming the file and the tensor or field that does not fit.
    """

    def __init__(self, file: Path, options: Options):
        self.file = file
        header = safetensors_io.read_header(file)
        metadata = safetensors_io.read_metadata(file)
        header = {_OLD_CLIP.sub(r"\1text_model.\2", n): e for n, e in header.items()}
        self.family = families.family_of(file, header)
        families.check_header(file, metadata, self.family)
        self._entries = _averaged(file, header, options.ema)
        has_vae = any(name.startswith(tensors.VAE) for name in header)
        if not has_vae and not options.vae:
            raise UserError(
                f"{one_line(file)}: holds no VAE ({tensors.VAE}...); name a folder or "
                "hub id to take it from with gift-jax convert from-single-file and "
                "--vae"
            )
        self.configs: Configs = single_configs.infer(
            file,
            {name: entry.shape for name, entry in self._entries.items()},
            self.family,
            families.prediction_type(
                file, metadata, header, self.family, options.prediction
            ),
            has_vae=has_vae and not options.vae,
            resolution=single_configs.resolution(metadata),
            zero_snr=families.ZERO_SNR_KEY in header,
        )
        self._check_channels()
        self.tensors = single_configs.all_tensors(self.configs, self.family)
        for rows in self.tensors.values():
            rows[:] = [t for t in rows if t.original in header or not t.optional]
        self._check_complete(header)

    def tables(self, dtype: str | None) -> dict[str, Table]:
        """Returns {component: what to write}; dtype: of every weight, None: its own."""
        return {
            component: {
                tensor.name: _in_folder(tensor, self._entries[tensor.original], dtype)
                for tensor in rows
            }
            for component, rows in self.tensors.items()
        }

    def _check_channels(self) -> None:
        channels, latents = (self.configs["unet"]["in_channels"], 4)
        if "vae" in self.configs:
            latents = self.configs["vae"]["latent_channels"]
        if channels != latents:
            kind = {9: " (inpainting)", 8: " (edits of images)", 5: " (depth)"}
            raise UserError(
                f"{one_line(self.file)}: {tensors.UNET}input_blocks.0.0.weight has "
                f"{channels} input channels{kind.get(channels, '')}; must be "
                f"{latents}, those of latents alone; take the plain model"
            )

    def _check_complete(self, header: Mapping[str, Entry]) -> None:
        """Raises UserError for a tensor that is missing, unknown or of a wrong kind."""
        label, file = self.family.label, one_line(self.file)
        rows = [tensor for part in self.tensors.values() for tensor in part]
        expected = {tensor.original: tensor for tensor in rows}
        missing = sorted(expected.keys() - self._entries.keys())
        if missing:
            raise UserError(
                f"{file}: misses {missing[0]} and {len(missing) - 1} other tensors of "
                f"a {label}; the file is incomplete, or of another model"
            )
        unknown = sorted(
            name for name in header.keys() - expected if self._counts(name)
        )
        if unknown:
            raise UserError(
                f"{file}: {one_line(unknown[0])} and {len(unknown) - 1} others are no "
                f"tensors of a {label}; the file is of another model, or holds more "
                "than one"
            )
        for name, tensor in expected.items():
            entry, shape = self._entries[name], tensor.original_shape
            if entry.shape != shape and not (
                tensor.form == "conv" and entry.shape == tensor.shape
            ):
                raise UserError(
                    f"{file}: {name} has shape {list(entry.shape)}, but beside its "
                    f"other tensors it must have {list(shape)}; the file is damaged, "
                    "or of another model"
                )
            if entry.dtype not in safetensors_io.DTYPES and not tensor.optional:
                known = ", ".join(safetensors_io.DTYPES)
                raise UserError(
                    f"{file}: {name} has dtype {entry.dtype}; must be one of {known}; "
                    "take the file in one of these"
                )

    def _counts(self, name: str) -> bool:
        """Whether a tensor that no component has is of some use."""
        if "vae" not in self.configs and name.startswith(tensors.VAE):
            return False  # another one takes its place
        text = self.family.text["text_encoder"]
        if self.family.name == "sd21":
            layer = re.match(
                rf"{re.escape(text.prefix)}transformer\.resblocks\.(\d+)", name
            )
            if layer or name == f"{text.prefix}text_projection":
                used = self.configs["text_encoder"]["num_hidden_layers"]
                return bool(layer) and int(layer[1]) < used
        return not _USELESS.fullmatch(name)


def _averaged(file: Path, header: Mapping[str, Entry], ema: bool) -> dict[str, Entry]:
    """Returns the tensors, with --ema those of the UNet from their running averages."""
    has_ema = any(name.startswith(f"{_EMA}diffusion_model") for name in header)
    if has_ema and not ema:
        logging.info("%s: its EMA weights are not taken; --ema takes them", file)
    if not ema:
        return dict(header)
    if not has_ema:
        raise UserError(
            f"--ema: {one_line(file)} holds no EMA weights ({_EMA}...); leave it out"
        )
    entries = dict(header)
    for name in header:
        if name.startswith(tensors.UNET):
            average = _EMA + name.removeprefix("model.").replace(".", "")
            if average not in header:
                raise UserError(
                    f"--ema: {one_line(file)} has no {one_line(average)}; leave it out"
                )
            entries[name] = header[average]
    return entries


def _in_folder(tensor: Tensor, entry: Entry, dtype: str | None) -> tuple:
    """Returns what to write of one tensor: (dtype, shape, function that reads it)."""
    if tensor.form in THIRDS:
        size = (entry.end - entry.begin) // len(THIRDS)
        begin = entry.begin + THIRDS.index(tensor.form) * size
        entry = entry._replace(begin=begin, end=begin + size)
    shape = tensor.shape[::-1] if tensor.form == "transposed" else tensor.shape
    entry = entry._replace(shape=shape)
    known = dtype if dtype and entry.dtype in safetensors_io.DTYPES else entry.dtype

    def read() -> np.ndarray:
        array = safetensors_io.read_tensor(tensor.original, entry, only_floats=False)
        array = array.T if tensor.form == "transposed" else array
        return safetensors_io.cast(tensor.original, array, dtype) if dtype else array

    return known, tensor.shape, read
