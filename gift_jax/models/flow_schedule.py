# SPDX-License-Identifier: Apache-2.0
"""A scheduler_config.json of flow matching: its keys, and the process it describes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gift_jax.diffusion import FlowMatching
from gift_jax.models import config_keys
from gift_jax.models.config_keys import Keys, Rule, number, only, whole
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
_OFF = only(False, None)
_KEYS = Keys(
    rules={
        "num_train_timesteps": whole(1, 10**6),
        "shift": number(0),
        "use_dynamic_shifting": Rule(
            lambda value: value in (False, None),
            "False: a shift that depends on the image's size is not computed",
        ),
        "invert_sigmas": _OFF,
        "shift_terminal": only(None, 0),
        "use_karras_sigmas": only(False),
        "use_exponential_sigmas": only(False),
        "use_beta_sigmas": only(False),
        "stochastic_sampling": _OFF,
        "time_shift_type": only("exponential", "linear"),
    },
    harmless=frozenset(  # without dynamic shifting
        ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    ),
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
    config_keys.check(_KEYS, config, file)


def complete(config: Mapping[str, Any], cls: str = "") -> dict[str, Any]:
    """Returns every key that a class of diffusers reads of a config, defaults included.

    Args: config: a scheduler_config.json dict. cls: of `CLASSES`, which read alike what
      is computed here.
    Raises: UserError for a key, or a value, that is not computed.
    """
    config_keys.check(_KEYS, config, "scheduler")
    unset = config.get("_use_default_values", ())
    keys = DEFAULTS.keys() & config.keys() - set(unset)
    return DEFAULTS | {key: config[key] for key in keys if config[key] is not None}


def shifted(config: Mapping[str, Any], sigma: np.ndarray) -> np.ndarray:
    """Returns shift sigma / (1 + (shift - 1) sigma), in sigma's type.

    Source: Esser et al. 2024, arXiv:2403.03206, section 5.3.2.
    """
    shift = config["shift"]
    return shift * sigma / (1 + (shift - 1) * sigma)


def training_sigmas(config: Mapping[str, Any]) -> np.ndarray:
    """Returns float32 "T": the levels of training, descending, as PyTorch rounds them.

    Args: config: see `complete`.
    Source: diffusers `FlowMatchEulerDiscreteScheduler.__init__`.
    """
    full = complete(config)
    T = full["num_train_timesteps"]
    return shifted(full, np.arange(T, 0, -1, dtype=np.float32) / np.float32(T))


def noise_process(config: Mapping[str, Any]) -> FlowMatching:
    """Returns the process that a model with this config is trained on."""
    return FlowMatching(training_sigmas(config))
