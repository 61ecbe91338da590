# SPDX-License-Identifier: Apache-2.0
"""Every scheduler as one table of coefficients.

Each step of a scheduler offered here is a fixed linear combination of the current
latents, the model's outputs and earlier outputs. `schedule` computes the coefficients
in float64 from a diffusers scheduler config; `sampler.advance` then serves them all and
equals the PyTorch schedulers, `timestep_spacing` and `rescale_betas_zero_snr` included.
"""

from typing import NamedTuple

import numpy as np

from gift_jax.models.sd import stable_diffusion
from gift_jax.runtime.errors import UserError

SCHEDULERS = ("ddim", "pndm", "dpmsolver++")
_CLASSES = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "DPMSolverMultistepScheduler": "dpmsolver++",
}
HISTORY = 4
# Adams-Bashforth weights of the newest 1, 2, 3 and 4 outputs (PNDM, eq. 12)
_MULTISTEP = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


class Schedule(NamedTuple):
    """One row a UNet call, "N": with m the guided output, x the latents, h the history,

        p  = clip(from_x x + from_m m)           what is remembered: x0, or m itself
        h  = (p, h0, h1, h2)  where `push`, else h
        x' = on_x (x before the last step, where `restart`; else x) + on_m m + on_h h

    t: int32 "N". on_h: float32 "N 4". The others: float32 "N"; push, restart: bool "N".
    """

    t: np.ndarray
    from_x: np.ndarray
    from_m: np.ndarray
    on_x: np.ndarray
    on_m: np.ndarray
    on_h: np.ndarray
    push: np.ndarray
    restart: np.ndarray


class _Rows:
    """Collects rows of a `Schedule`; whatever a row does not name is 0 or False."""

    def __init__(self):
        self._rows = []

    def add(self, t, *, on_h=(), push=True, restart=False, **scalars):
        on_h = tuple(on_h) + (0.0,) * (HISTORY - len(on_h))
        defaults = {"from_x": 0.0, "from_m": 0.0, "on_x": 0.0, "on_m": 0.0}
        row = defaults | scalars
        self._rows.append(Schedule(t, on_h=on_h, push=push, restart=restart, **row))

    def done(self):
        columns = Schedule(*zip(*self._rows, strict=True))
        dtypes = Schedule(np.int32, *[np.float32] * 5, bool, bool)
        return Schedule(
            *(np.asarray(c, d) for c, d in zip(columns, dtypes, strict=True))
        )


def default_scheduler(config):
    """Returns the folder's own scheduler if it is offered here, else "ddim"."""
    return _CLASSES.get(config.get("_class_name"), "ddim")


def schedule(config, scheduler, steps):
    """Returns the Schedule of a diffusers scheduler config.

    Args: config: a scheduler_config.json dict. scheduler: of `SCHEDULERS`.
      steps: asked for; PNDM calls the UNet once more.
    Raises: UserError for an unknown scheduler or field value, or a bad number of steps.
    Source: diffusers `scheduling_{ddim,pndm,dpmsolver_multistep}.py`.
    """
    if scheduler not in SCHEDULERS:
        raise UserError(
            f"scheduler={scheduler!r} must be one of {', '.join(SCHEDULERS)}"
        )
    T = config.get("num_train_timesteps", 1000)
    if not 1 <= steps <= T:
        raise UserError(f"steps={steps} must be from 1 to {T}, the training timesteps")
    table = {"ddim": _ddim, "pndm": _pndm, "dpmsolver++": _dpm}[scheduler]
    return table(config, steps, stable_diffusion.alphas_cumprod(config))


def clip_range(config, scheduler):
    """Returns how far x0 may go from 0 (DDIM with clip_sample), or None."""
    if scheduler == "ddim" and config.get("clip_sample", True):
        return float(config.get("clip_sample_range", 1.0))
    return None


def _spaced(config, steps, default="leading", extra=0):
    """Returns the timesteps, int "steps", descending. extra: DPM-Solver drops one."""
    T = config.get("num_train_timesteps", 1000)
    spacing = config.get("timestep_spacing", default)
    offset = config.get("steps_offset", 0)
    if spacing == "linspace":
        t = np.linspace(0, T - 1, steps + extra).round()[::-1]
    elif spacing == "leading":
        t = (np.arange(steps + extra) * (T // (steps + extra)))[::-1] + offset
    elif spacing == "trailing":
        t = np.round(np.arange(T, 0, -T / steps)) - 1
    else:
        raise UserError(
            f"scheduler timestep_spacing={spacing!r}; must be one of leading, "
            "linspace, trailing"
        )
    t = t.astype(np.int64)[:steps]
    if t.max() >= T:
        raise UserError(
            f"steps={steps} with steps_offset={offset} reaches timestep {t.max()}, "
            f"past {T - 1}; use fewer steps"
        )
    return t


def _x0_and_eps(config, abar):
    """Returns ((x, m) coefficients of x0, (x, m) coefficients of eps) at abar."""
    a, s = np.sqrt(abar), np.sqrt(1 - abar)
    if config.get("prediction_type", "epsilon") == "v_prediction":
        return (a, -s), (s, a)
    return (1 / a, -s / a), (0.0, 1.0)


def _final_abar(config, abar_T, default):
    return 1.0 if config.get("set_alpha_to_one", default) else abar_T[0]


def _refuse(config, field, allowed):
    if field in config and config[field] not in allowed:
        choices = " or ".join(map(repr, allowed))
        raise UserError(f"scheduler {field}={config[field]!r}; must be {choices}")


def _ddim(config, steps, abar_T):
    _refuse(config, "thresholding", (False,))
    stride, rows = len(abar_T) // steps, _Rows()
    for t in _spaced(config, steps):
        before = t - stride
        abar = abar_T[before] if before >= 0 else _final_abar(config, abar_T, True)
        x0, eps = _x0_and_eps(config, abar_T[t])
        keep = np.sqrt(1 - abar)
        rows.add(
            t,
            from_x=x0[0],
            from_m=x0[1],
            on_x=keep * eps[0],
            on_m=keep * eps[1],
            on_h=(np.sqrt(abar),),
        )
    return rows.done()


def _pndm(config, steps, abar_T):
    """Pseudo linear multistep: the second call redoes the first step (Heun)."""
    _refuse(config, "skip_prk_steps", (True,))
    stride, rows = len(abar_T) // steps, _Rows()
    ts = _spaced(config, steps)
    calls = [*ts[:2], *ts[1:]]
    for i, t in enumerate(calls):
        now, before = (t + stride, t) if i == 1 else (t, t - stride)
        a = abar_T[now]
        b = abar_T[before] if before >= 0 else _final_abar(config, abar_T, False)
        scale = np.sqrt(b / a)
        rate = -(b - a) / (a * np.sqrt(1 - b) + np.sqrt(a * (1 - a) * b))
        _, eps = _x0_and_eps(config, a)
        if i == 1:
            own, older = 0.5, (0.5,)
        else:
            own, older = 0.0, _MULTISTEP[min(i - (i > 1), 3)]
        rows.add(
            t,
            from_m=1.0,
            on_x=scale + rate * eps[0],
            on_m=rate * eps[1] * own,
            on_h=[rate * eps[1] * w for w in older],
            push=i != 1,
            restart=i == 1,
        )
    return rows.done()


def _dpm(config, steps, abar_T):
    for field, allowed in (
        ("thresholding", (False,)),
        ("algorithm_type", ("dpmsolver++",)),
        ("solver_order", (1, 2)),
        ("use_karras_sigmas", (False, None)),
        ("use_exponential_sigmas", (False, None)),
        ("use_beta_sigmas", (False, None)),
        ("use_flow_sigmas", (False, None)),
        ("use_lu_lambdas", (False, None)),
        ("lambda_min_clipped", (-np.inf, None)),
    ):
        _refuse(config, field, allowed)
    if config.get("rescale_betas_zero_snr", False):
        abar_T = np.append(abar_T[:-1], 2.0**-24)
    ts = _spaced(config, steps, default="linspace", extra=1)
    ends_at_zero = config.get("final_sigmas_type", "zero") == "zero"
    a, s, lam = _half_log_snr(np.append(abar_T[ts], 1.0 if ends_at_zero else abar_T[0]))
    last_first = (
        ends_at_zero
        or config.get("euler_at_final", False)
        or (config.get("lower_order_final", True) and steps < 15)
    )
    heun, rows = config.get("solver_type", "midpoint") == "heun", _Rows()
    for i, t in enumerate(ts):
        h = lam[i + 1] - lam[i]
        decay = np.expm1(-h)
        first = i == 0 or (i == steps - 1 and last_first)
        slope = 0.0  # of (newest x0 - the one before)
        if not first and config.get("solver_order", 2) == 2:
            r0 = (lam[i] - lam[i - 1]) / h
            slope = (decay / h + 1 if heun else -0.5 * decay) / r0
        x0, _ = _x0_and_eps(config, a[i] ** 2)
        rows.add(
            t,
            from_x=x0[0],
            from_m=x0[1],
            on_x=s[i + 1] / s[i],
            on_h=(a[i + 1] * (slope - decay), -a[i + 1] * slope),
        )
    return rows.done()


def _half_log_snr(abar):
    """Returns (alpha, sigma, log(alpha / sigma)); the last is inf at abar = 1."""
    a, s = np.sqrt(abar), np.sqrt(1 - abar)
    with np.errstate(divide="ignore"):
        return a, s, np.log(a) - np.log(s)
