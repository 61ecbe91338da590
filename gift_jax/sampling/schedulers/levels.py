# SPDX-License-Identifier: Apache-2.0
"""The timesteps and noise levels (sigmas) that the steps of a scheduler lie on."""

import numpy as np

from gift_jax.models.sd.scheduler_config import alphas_cumprod
from gift_jax.runtime.errors import UserError, choice
from gift_jax.sampling.schedulers.rows import Config

_SPACINGS = ("leading", "linspace", "trailing")
_ALMOST_ZERO = 2.0**-24  # in place of a last cumulative alpha of 0


def spaced(config: Config, steps: int, *, extra: int = 0, last: int = 0, whole=True):
    """Returns the timesteps, "steps", descending.

    Args: extra: so many more are spaced and dropped at the end. last: one more than the
      largest timestep; 0: of the training. whole: round them.
    Raises: UserError for an unknown spacing, or timesteps that training did not have.
    """
    T = config["num_train_timesteps"]
    last = last or T
    spacing = config["timestep_spacing"]
    choice("scheduler timestep_spacing", spacing, _SPACINGS)
    offset, points = config["steps_offset"], steps + extra
    if spacing == "linspace":
        t = np.linspace(0, last - 1, points)[::-1]
        t = t.round() if whole else t.astype(np.float32)
        t = t[:steps]
    elif spacing == "leading":
        t = (np.arange(points) * (last // points))[::-1][:steps] + offset
    else:
        t = np.arange(last, 0, -T / steps).round() - 1
    if t.max() >= T or t.min() < 0:
        wrong = t.max() if t.max() >= T else t.min()
        why = f"steps_offset={offset}" if wrong > 0 else "timestep_spacing=trailing"
        raise UserError(
            f"steps={steps} with {why} reaches timestep {wrong:.0f}, which is not from "
            f"0 to {T - 1}; use fewer steps"
        )
    return t.astype(np.float64)


def training_sigmas(config: Config) -> np.ndarray:
    """Returns float32 "T": sqrt((1 - abar) / abar), as PyTorch rounds it."""
    abar_T = alphas_cumprod(config).astype(np.float32)
    if config.get("rescale_betas_zero_snr"):
        abar_T[-1] = _ALMOST_ZERO
    return np.sqrt((1 - abar_T) / abar_T)


def k_levels(config: Config, steps: int, *, whole_karras=False, karras_bounds=True):
    """Returns (t, sigmas "steps") of the schedulers that count in sigma.

    Args: whole_karras: round the timesteps of Karras' sigmas. karras_bounds: those obey
      sigma_min and sigma_max.
    """
    t, train = spaced(config, steps, whole=False), training_sigmas(config)
    sigmas = np.interp(t, np.arange(len(train)), train)
    if config.get("interpolation_type", "linear") != "linear":
        kinds = ("linear", "log_linear")
        choice("scheduler interpolation_type", config["interpolation_type"], kinds)
        low, high = np.log(train[0]), np.log(train[-1])
        sigmas = np.exp(np.linspace(high, low, steps + 1))
    other = _respaced(config, steps, sigmas[-1], sigmas[0], karras_bounds)
    if other is not None:
        sigmas, t = other, timesteps_at(other, train)
        if whole_karras and config["use_karras_sigmas"]:
            t = t.round()
    check_first(t, steps)
    return t, sigmas


def solver_levels(config: Config, steps: int, *, last: int = 0, to_nearest=True):
    """Returns (whole t, sigmas "steps") of the DPM solvers, UniPC and DEIS.

    Args: last: see `spaced`. to_nearest: whether the timesteps of Karras' sigmas and of
      Lu's lambdas are rounded; else, and those of the others, they are cut.
    """
    t, train = spaced(config, steps, extra=1, last=last), training_sigmas(config)
    use_lu = config.get("use_lu_lambdas") and not config["use_karras_sigmas"]
    if use_lu:
        low, high = np.log(train[[0, -1]]).astype(np.float64)
        sigmas = np.exp(high + np.linspace(0, 1, steps) * (low - high))
    else:
        sigmas = _respaced(config, steps, float(train[0]), float(train[-1]))
    if sigmas is None:
        sigmas = np.interp(t, np.arange(len(train)), train)
    else:
        t = timesteps_at(sigmas, train)
        if to_nearest and (use_lu or config["use_karras_sigmas"]):
            t = t.round()
        t = np.trunc(t)
    check_first(t, steps)
    return t, sigmas


def last_sigma(config: Config, sigmas: np.ndarray, *, own: bool = False) -> float:
    """Returns what follows the last of the sigmas, by final_sigmas_type.

    Args: own: "sigma_min" is the last of other sigmas than the training's, not theirs.
    """
    kind = choice(
        "scheduler final_sigmas_type",
        config["final_sigmas_type"],
        ("zero", "sigma_min"),
    )
    if kind == "zero":
        return 0.0
    return float(sigmas[-1] if own else training_sigmas(config)[0])


def has_other_sigmas(config: Config) -> bool:
    """Whether the sigmas are Karras', exponential or beta's."""
    return any(config.get(f"use_{k}_sigmas") for k in ("karras", "exponential", "beta"))


def timesteps_at(sigmas: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Returns the fractional timesteps of sigmas, between the training's.

    Source: diffusers `EulerDiscreteScheduler._sigma_to_t`.
    """
    logs = np.log(train)
    log = np.log(np.maximum(sigmas, 1e-10))
    below = (log[None] - logs[:, None]) >= 0
    low = np.cumsum(below, axis=0).argmax(axis=0).clip(max=len(logs) - 2)
    with np.errstate(invalid="ignore"):
        w = np.clip((logs[low] - log) / (logs[low] - logs[low + 1]), 0, 1)
    return (1 - w) * low + w * (low + 1)


def _respaced(config: Config, steps: int, low, high, karras_bounds=True):
    """Returns Karras', exponential or beta's sigmas, or None if none is asked for.

    Source: arXiv:2206.00364, eq. 5; k-diffusion; arXiv:2407.12173.
    """
    kinds = [
        k for k in ("karras", "exponential", "beta") if config.get(f"use_{k}_sigmas")
    ]
    if not kinds:
        return None
    if len(kinds) > 1:
        keys = " and ".join(f"use_{kind}_sigmas" for kind in kinds)
        raise UserError(f"scheduler has {keys}; at most one of them may be true")
    if kinds != ["karras"] or karras_bounds:
        low = low if config["sigma_min"] is None else config["sigma_min"]
        high = high if config["sigma_max"] is None else config["sigma_max"]
    if not 0 < low <= high:
        raise UserError(
            f"scheduler sigma_min={low} and sigma_max={high}; must be above 0, the "
            "smaller one first"
        )
    ramp = np.linspace(0, 1, steps)
    if kinds == ["karras"]:
        rho = 7.0
        first, last = high ** (1 / rho), low ** (1 / rho)
        return (first + ramp * (last - first)) ** rho
    if kinds == ["exponential"]:
        return np.exp(np.linspace(np.log(high), np.log(low), steps))
    return low + _beta_quantile(1 - ramp) * (high - low)


def _beta_quantile(p: np.ndarray, a: float = 0.6) -> np.ndarray:
    """Returns the inverse of the cumulative Beta(a, a) distribution, by bisection."""
    n = np.arange(200)
    # B(x; a, a) = x^a sum_n (1 - a)_n / n! x^n / (a + n), which converges up to 1/2
    ratios = np.concatenate([[1.0], np.cumprod((1 - a + n[:-1]) / (n[:-1] + 1))])

    def integral(x):
        return x**a * np.sum(ratios * x[:, None] ** n / (a + n), axis=1)

    mirrored = p > 0.5
    target = np.where(mirrored, 1 - p, p) * 2 * integral(np.array([0.5]))
    low, high = np.zeros_like(p), np.full_like(p, 0.5)
    for _ in range(80):
        middle = (low + high) / 2
        below = integral(middle) < target
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    x = np.where(target == 0, 0.0, (low + high) / 2)
    return np.where(mirrored, 1 - x, x)


def k_first_scale(sigmas: np.ndarray, config: Config) -> float:
    """Returns the standard deviation of the first latents of the k schedulers."""
    largest = float(sigmas.max())
    if config["timestep_spacing"] in ("linspace", "trailing"):
        return largest
    return float(np.hypot(largest, 1))


def check_first(t: np.ndarray, steps: int) -> None:
    """Raises UserError if the first timestep comes twice, where PyTorch goes astray."""
    if np.sum(t == t[0]) > 1:
        raise UserError(
            f"steps={steps}: the scheduler's first timestep, {t[0]:.0f}, comes more "
            "than once; use fewer steps"
        )
