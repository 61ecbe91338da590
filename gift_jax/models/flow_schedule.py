# SPDX-License-Identifier: Apache-2.0
"""A scheduler_config.json of flow matching: its keys, and the process it describes."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gift_jax.diffusion import FlowMatching
from gift_jax.models import config_keys
from gift_jax.models.config_keys import Keys, either, number, only, whole
from gift_jax.runtime.errors import UserError, shown

CLASSES = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
DEFAULTS: dict[str, Any] = {  # of the first; the others know some of these keys
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "invert_sigmas": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "time_shift_type": "exponential",
    "stochastic_sampling": False,
}
# A family's own key: the tokens of an image. Its pipeline hands over 1 ... 1 / steps.
TOKENS = "_image_tokens"
_OFF = only(False, None)
_NUMBER = either(number(), only(None))


def _conflict(values: Mapping[str, Any]) -> str:
    if not values["use_dynamic_shifting"]:
        return ""
    if TOKENS not in values:
        return (
            "use_dynamic_shifting=True is not supported; must be False: a shift that "
            "depends on the image's size is not computed for this model"
        )
    low, high = values["base_image_seq_len"], values["max_image_seq_len"]
    return "" if low < high else f"max_image_seq_len={high} must be above {low}"


_KEYS = Keys(
    rules={
        "num_train_timesteps": whole(1, 10**6),
        "shift": number(0),
        "use_dynamic_shifting": only(False, True, None),
        "base_shift": _NUMBER,
        "max_shift": _NUMBER,
        "base_image_seq_len": whole(),
        "max_image_seq_len": whole(),
        "invert_sigmas": _OFF,
        "shift_terminal": only(None, 0),
        "use_karras_sigmas": only(False),
        "use_exponential_sigmas": only(False),
        "use_beta_sigmas": only(False),
        "stochastic_sampling": _OFF,
        "time_shift_type": only("exponential", "linear"),
    },
    defaults=DEFAULTS,
    conflict=_conflict,
    complete=True,
)


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a config is of a class of flow matching."""
    return config.get("_class_name") in CLASSES


def check(config: Mapping[str, Any], file: str) -> None:
    """Raises UserError, naming the file, for another class or a key not computed."""
    if not is_flow(config):
        raise UserError(
            f"{file}: scheduler {shown(config.get('_class_name'))} is not one of "
            f"diffusers' for flow matching; must be {' or '.join(CLASSES)}"
        )
    if TOKENS in config and config["_class_name"] != CLASSES[0]:
        raise UserError(
            f"{file}: scheduler {shown(config['_class_name'])} must be {CLASSES[0]}: "
            "the pipeline hands over the levels, which no other class takes"
        )
    config_keys.check(_KEYS, config, file)


def complete(config: Mapping[str, Any], cls: str = "") -> dict[str, Any]:
    """Returns every key that a class of diffusers reads of a config, defaults included.

    Args: config: a scheduler_config.json dict. cls: of `CLASSES`, which read alike what
      is computed here.
    Raises: UserError for a key, or a value, that is not computed.
    """
    config_keys.check(_KEYS, config, "scheduler")
    unset = config.get("_use_default_values", ())
    keys = (DEFAULTS.keys() | {TOKENS}) & config.keys() - set(unset)
    return DEFAULTS | {key: config[key] for key in keys if config[key] is not None}


def shifted(config: Mapping[str, Any], sigma: np.ndarray) -> np.ndarray:
    """Returns shift sigma / (1 + (shift - 1) sigma), in sigma's type.

    Source: Esser et al. 2024, arXiv:2403.03206, section 5.3.2.
    """
    shift = config["shift"]
    return shift * sigma / (1 + (shift - 1) * sigma)


def image_sigmas(config: Mapping[str, Any], steps: int) -> np.ndarray:
    """Returns float32 "steps": the levels to draw with, descending, of `TOKENS`.

    A dynamic shift lies on the line through (base_image_seq_len, base_shift) and
    (max_image_seq_len, max_shift), and is the exponent of the factor, or the factor.

    Args: config: see `complete`.
    Source: diffusers `FluxPipeline.__call__`, `calculate_shift`,
      `FlowMatchEulerDiscreteScheduler.time_shift`.
    """
    sigma = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    if not config["use_dynamic_shifting"]:
        return shifted(config, sigma)
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    shift = config[TOKENS] * slope + (config["base_shift"] - slope * low)
    if config["time_shift_type"] == "exponential":
        shift = math.exp(shift)
    return shift / (shift + (1 / sigma - 1))


def training_sigmas(config: Mapping[str, Any]) -> np.ndarray:
    """Returns float32 "T": the levels of training, descending, as PyTorch rounds them.

    A dynamic shift is one of drawing alone.

    Args: config: see `complete`.
    Source: diffusers `FlowMatchEulerDiscreteScheduler.__init__`.
    """
    full = complete(config)
    T = full["num_train_timesteps"]
    sigma = np.arange(T, 0, -1, dtype=np.float32) / np.float32(T)
    return sigma if full["use_dynamic_shifting"] else shifted(full, sigma)


def noise_process(config: Mapping[str, Any]) -> FlowMatching:
    """Returns the process that a model with this config is trained on."""
    return FlowMatching(training_sigmas(config))
