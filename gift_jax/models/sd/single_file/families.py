# SPDX-License-Identifier: Apache-2.0
"""Which Stable Diffusion a single file holds, what it predicts, or what else it is."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from absl import logging

from gift_jax.models.sd.single_file import tensors
from gift_jax.runtime.errors import UserError, one_line, shown

ARCHITECTURE = "modelspec.architecture"  # in the header
PREDICTION = "modelspec.prediction_type"
V_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"  # names of tensors that are but marks
PREDICTIONS = ("epsilon", "v_prediction")
_STATED = {"epsilon": "epsilon", "eps": "epsilon"}
_STATED |= {"v": "v_prediction", "v_prediction": "v_prediction"}


class Text(NamedTuple):
    """Where a file holds a text encoder: the names' beginning, and whose names."""

    prefix: str
    is_open_clip: bool


class Family(NamedTuple):
    """A family of models.

    Attributes: name: of `architectures.MODELS`. label: in words. architecture: what the
      header's value begins with. text: component -> where it is.
    """

    name: str
    label: str
    architecture: str
    text: Mapping[str, Text]


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "sd15",
            "Stable Diffusion 1.x",
            "stable-diffusion-v1",
            {"text_encoder": Text("cond_stage_model.transformer.", False)},
        ),
        Family(
            "sd21",
            "Stable Diffusion 2.x",
            "stable-diffusion-v2",
            {"text_encoder": Text("cond_stage_model.model.", True)},
        ),
        Family(
            "sdxl",
            "Stable Diffusion XL",
            "stable-diffusion-xl",
            {
                "text_encoder": Text("conditioner.embedders.0.transformer.", False),
                "text_encoder_2": Text("conditioner.embedders.1.model.", True),
            },
        ),
    )
}
_OTHERS = {  # a tensor's name: what has it, whatever else is in the file
    r"lora_(unet|te\d?)_|.*[._](lora_[AB]|lora_up|lora_down|lora\.up|lora\.down)\.": (
        "a LoRA, which changes a model: give it to config.adapters.lora"
    ),
    r"control_model\.|controlnet_cond_embedding\.|input_hint_block\.": "a ControlNet",
    r"(.*\.)?double_blocks\.": "a Flux",
    r"(.*\.)?joint_blocks\.": "a Stable Diffusion 3",
    r"conditioner\.embedders\.0\.model\.": (
        "the refiner of Stable Diffusion XL, which draws nothing alone: take the base"
    ),
    r"edm_mean$|edm_vpred\.": "a model of EDM's noise, such as Playground 2.5",
}
_PARTS = {  # of files without a UNet
    r"(first_stage_model\.)?(encoder\.down|decoder\.up)\.": (
        "a VAE alone: give convert from-single-file a whole model, and with --vae a "
        "folder of this VAE"
    ),
    r"(emb_params|string_to_param|clip_[lg]$)": (
        "a textual inversion: give it to config.adapters.textual_inversion"
    ),
    r"(down|up|mid)_blocks?\.": "a UNet or a VAE by diffusers' names, alone",
    r"(text_model|transformer\.resblocks|cond_stage_model)\.": "a text encoder alone",
}


def family_of(file: Path, names: Collection[str]) -> Family:
    """Returns the family of a file's tensors.

    Raises: UserError saying what it seems to be, for another kind of file.
    """
    kinds = dict(_OTHERS)
    if not any(name.startswith(tensors.UNET) for name in names):
        kinds |= _PARTS
    for pattern, kind in kinds.items():
        for name in sorted(names):
            if re.match(pattern, name):
                raise UserError(
                    f"{one_line(file)}: {one_line(name)} is of no Stable Diffusion 1, "
                    f"2 or XL; the file seems to be {kind}"
                )
    if kinds != _OTHERS:
        first = one_line(min(names, default="no tensor"))
        raise UserError(
            f"{one_line(file)}: holds no UNet ({tensors.UNET}...) but {first}; must be "
            "a whole Stable Diffusion 1, 2 or XL by its original names"
        )
    for family in reversed(FAMILIES.values()):
        prefixes = tuple(text.prefix for text in family.text.values())
        if all(any(name.startswith(prefix) for name in names) for prefix in prefixes):
            return family
    expected = " or ".join(
        " and ".join(f"{text.prefix}..." for text in family.text.values())
        for family in FAMILIES.values()
    )
    raise UserError(
        f"{one_line(file)}: holds a UNet without its text encoders ({expected}); "
        "must be a whole model"
    )


def check_header(file: Path, metadata: Mapping[str, str], family: Family) -> None:
    """Raises UserError if a header names another architecture than the tensors are of.

    What it names beside the three families is not judged.
    """
    stated = metadata.get(ARCHITECTURE, "")
    misfits = {f.architecture for f in FAMILIES.values()} - {family.architecture}
    misfits |= {"stable-diffusion-3", "stable-diffusion-v3", "flux"}
    if stated.lower().startswith(tuple(misfits)) or "refiner" in stated:
        raise UserError(
            f"{one_line(file)}: its header says {ARCHITECTURE}={shown(stated)}, but "
            f"its tensors are those of {family.label}; copy the file again, or delete "
            "the field"
        )


def prediction_type(
    file: Path,
    metadata: Mapping[str, str],
    names: Collection[str],
    family: Family,
    flag: str,
) -> str:
    """Returns "epsilon" or "v_prediction": what the file's UNet predicts.

    Args: flag: of --prediction, which decides; "" if it was not given.
    Raises: UserError if the file contradicts itself, or is silent and of a family whose
      models differ.
    """
    statements = {}
    stated = metadata.get(PREDICTION)
    if stated is not None:
        if stated not in _STATED and not flag:
            raise UserError(
                f"{one_line(file)}: its header says {PREDICTION}={shown(stated)}; must "
                f"be epsilon or v; {_remedy()}"
            )
        statements[PREDICTION] = _STATED.get(stated)
    if V_KEY in names:
        statements[f"the tensor {V_KEY}"] = "v_prediction"
    architecture = metadata.get(ARCHITECTURE, "")
    for end, meaning in (("v2-512", "epsilon"), ("v2-768-v", "v_prediction")):
        if architecture == f"stable-diffusion-{end}":
            statements[ARCHITECTURE] = meaning
    if flag:
        for source, meaning in statements.items():
            if meaning != flag:
                logging.warning(
                    "%s: %s means %s; --prediction=%s decides",
                    *(file, source, meaning, flag),
                )
        return flag
    if len(set(statements.values())) > 1:
        listed = ", ".join(f"{source}: {m}" for source, m in statements.items())
        raise UserError(
            f"{one_line(file)}: contradicts itself on what its UNet predicts "
            f"({listed}); {_remedy()}"
        )
    if statements:
        return next(iter(statements.values()))
    if family.name == "sd21":
        raise UserError(
            f"{one_line(file)}: does not say what its UNet predicts, in which models "
            f"of {family.label} differ (512 pixels: epsilon, 768: v_prediction); "
            f"{_remedy()}"
        )
    return "epsilon"


def _remedy() -> str:
    return (
        "convert it with gift-jax convert from-single-file and "
        "--prediction=epsilon or --prediction=v_prediction"
    )
