# SPDX-License-Identifier: Apache-2.0
"""A diffusers scheduler_config.json: its keys by class, and the noise it describes."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gift_jax.diffusion import PREDICTION_TYPES
from gift_jax.runtime.errors import UserError, choice, shown

_BETAS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_K_BETAS = _BETAS | {"beta_start": 0.00085, "beta_end": 0.012}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_THRESHOLD = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_LEADING = {"timestep_spacing": "leading", "steps_offset": 0}
_LINSPACE = {"timestep_spacing": "linspace", "steps_offset": 0}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_SIGMAS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_BOUNDS = {"sigma_min": None, "sigma_max": None}
_FLOW = {
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
}
_DDPM = _BETAS | _CLIP | _THRESHOLD | _LEADING | _ZERO_SNR
_SOLVER = _BETAS | _THRESHOLD | _SIGMAS | _FLOW | {"solver_order": 2}
_DPM = _SOLVER | {
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -math.inf,
    "variance_type": None,
}
_SA = _BETAS | _THRESHOLD | _LINSPACE | _SIGMAS
_SA |= {
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "predictor_order": 2,
    "corrector_order": 2,
    "tau_func": None,
    "algorithm_type": "data_prediction",
    "lower_order_final": True,
    "lambda_min_clipped": -math.inf,
    "variance_type": None,
}
_LCM = _DDPM | {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "original_inference_steps": 50,
    "set_alpha_to_one": True,
    "timestep_scaling": 10.0,
}

# Of each class that describes a DDPM: its keys and their defaults in diffusers 0.42.
# Not all of them are drawn with, see `gift_jax.sampling.schedules`.
DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _DDPM | {"set_alpha_to_one": True},
    "DDIMParallelScheduler": _DDPM | {"set_alpha_to_one": True},
    "DDPMScheduler": _DDPM | {"variance_type": "fixed_small"},
    "DDPMParallelScheduler": _DDPM | {"variance_type": "fixed_small"},
    "PNDMScheduler": _BETAS
    | _LEADING
    | {"skip_prk_steps": False, "set_alpha_to_one": False},
    "EulerDiscreteScheduler": _BETAS
    | _LINSPACE
    | _SIGMAS
    | _BOUNDS
    | _ZERO_SNR
    | {
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "final_sigmas_type": "zero",
    },
    "EulerAncestralDiscreteScheduler": _BETAS | _LINSPACE | _ZERO_SNR,
    "HeunDiscreteScheduler": _K_BETAS
    | _LINSPACE
    | _SIGMAS
    | {"clip_sample": False, "clip_sample_range": 1.0},
    "LMSDiscreteScheduler": _BETAS | _LINSPACE | _SIGMAS,
    "KDPM2DiscreteScheduler": _K_BETAS | _LINSPACE | _SIGMAS,
    "KDPM2AncestralDiscreteScheduler": _K_BETAS | _LINSPACE | _SIGMAS,
    "DPMSolverMultistepScheduler": _DPM
    | _LINSPACE
    | _ZERO_SNR
    | {"lower_order_final": True, "euler_at_final": False, "use_lu_lambdas": False},
    "DPMSolverSinglestepScheduler": _DPM | {"lower_order_final": False},
    "DPMSolverSDEScheduler": _K_BETAS
    | _LINSPACE
    | _SIGMAS
    | {"noise_sampler_seed": None},
    "UniPCMultistepScheduler": _SOLVER
    | _LINSPACE
    | _ZERO_SNR
    | _BOUNDS
    | {
        "predict_x0": True,
        "solver_type": "bh2",
        "lower_order_final": True,
        "disable_corrector": [],
        "solver_p": None,
        "final_sigmas_type": "zero",
        "shift_terminal": None,
    },
    "DEISMultistepScheduler": _SOLVER
    | _LINSPACE
    | {"algorithm_type": "deis", "solver_type": "logrho", "lower_order_final": True},
    "SASolverScheduler": _SA,
    "LCMScheduler": _LCM,
    "TCDScheduler": _LCM,
}
_KNOWN = frozenset().union(*DEFAULTS.values())


def class_name(config: Mapping[str, Any]) -> str:
    """Returns the class that a config is of."""
    return config.get("_class_name", "DDIMScheduler")


def check(config: Mapping[str, Any], file: str) -> None:
    """Raises UserError, naming the file, for a config whose noise is not known.

    That is one of another class than `DEFAULTS`, of flow matching, or with a key that
    no such class has.
    """
    try:
        full = complete(config)
        alphas_cumprod(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    if full.get("use_flow_sigmas"):
        raise UserError(
            f"{file}: use_flow_sigmas=True; must be False: no flow matching"
        )


def complete(config: Mapping[str, Any], cls: str = "") -> dict[str, Any]:
    """Returns every key that a class of diffusers reads of a config, defaults included.

    Args: config: a scheduler_config.json dict. cls: of `DEFAULTS`; "": its own class.
    Raises: UserError for another class, for a key that no class has, or for a value
      of the wrong type.
    Source: diffusers `ConfigMixin.extract_init_dict`: keys of other classes have no
      effect, and keys listed as left at their defaults get those of the class.
    """
    cls = cls or class_name(config)
    if cls not in DEFAULTS:
        raise UserError(
            f"scheduler {shown(cls)} is not one of diffusers' for Stable Diffusion 1 "
            "and 2 (DDIMScheduler, EulerDiscreteScheduler ...), whose noise is known"
        )
    for key, value in config.items():
        is_known = key in _KNOWN or key.startswith("_") or key == "quantization_config"
        if not is_known and value is not None and value is not False:
            raise UserError(
                f"scheduler {key}={shown(value)} is no key of diffusers' schedulers "
                "for Stable Diffusion; remove it if it has no effect"
            )
    unset = config.get("_use_default_values", ())
    defaults = _BOUNDS | DEFAULTS[cls]  # the bounds are read wherever they come from
    full = dict(defaults)
    for key in defaults.keys() & config.keys() - set(unset):
        full[key] = _checked(key, config[key], defaults[key])
    choice("scheduler prediction_type", full["prediction_type"], PREDICTION_TYPES)
    if full["num_train_timesteps"] < 1:
        steps = full["num_train_timesteps"]
        raise UserError(f"scheduler num_train_timesteps={steps}; must be at least 1")
    return full


def _checked(key: str, value: Any, default: Any) -> Any:
    """Returns a key's value if it is of its default's type."""
    if key in ("sigma_min", "sigma_max"):
        right = value is None or _is_number(value)
        kind = "a number or null"
    elif isinstance(default, bool):
        right, kind = isinstance(value, bool) or value is None, "true or false"
        value = bool(value) if right else value
    elif isinstance(default, int):
        right = _is_number(value) and value == int(value)
        kind = "a whole number"
        value = int(value) if right else value
    elif isinstance(default, float):
        right, kind = _is_number(value), "a number"
    elif isinstance(default, str):
        right, kind = isinstance(value, str), "a text"
    else:
        return value
    if not right:
        raise UserError(f"scheduler {key}={shown(value)}; must be {kind}")
    return value


def _is_number(value: Any) -> bool:
    """Whether JSON's value is a number; the clipped lambda may be infinite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and (math.isfinite(value) or value == -math.inf)


def alphas_cumprod(config: Mapping[str, Any]) -> np.ndarray:
    """Returns float64 "T": the cumulative alphas that a scheduler config describes.

    Rounded as PyTorch rounds them: betas and alphas to float32.

    Raises: UserError for an unknown beta_schedule or wrong betas.
    Source: diffusers `DDIMScheduler.__init__`; rescaling: arXiv:2305.08891, alg. 1.
    """
    config = DEFAULTS.get(class_name(config), _DDPM) | dict(config)
    alphas_T = np.float32(1) - _betas(config).astype(np.float32)
    abar_T = np.cumprod(alphas_T, dtype=np.float64).astype(np.float32)
    if config.get("rescale_betas_zero_snr"):
        root = np.sqrt(abar_T)
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        abar_T = root**2
    return abar_T.astype(np.float64)


def _betas(config: Mapping[str, Any]) -> np.ndarray:
    """Returns float64 "T"."""
    T, start, end = (
        config[key] for key in ("num_train_timesteps", "beta_start", "beta_end")
    )
    schedule, betas = config["beta_schedule"], config["trained_betas"]
    if betas is not None:
        if not isinstance(betas, list | tuple) or not all(map(_is_number, betas)):
            raise UserError(
                f"scheduler trained_betas={shown(betas)}; must be a list of numbers"
            )
        if len(betas) != T:
            raise UserError(
                f"scheduler trained_betas has {len(betas)} numbers; must be "
                f"num_train_timesteps={T}"
            )
        return np.asarray(betas, np.float64)
    if schedule == "linear":
        return np.linspace(start, end, T)
    if schedule == "scaled_linear":
        root = np.linspace(start**0.5, end**0.5, T)
        return root.astype(np.float32) ** 2
    if schedule == "squaredcos_cap_v2":
        cos = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - cos[1:] / cos[:-1], 0.999)
    raise UserError(
        f"scheduler beta_schedule={schedule!r}; must be one of linear, scaled_linear, "
        "squaredcos_cap_v2"
    )
