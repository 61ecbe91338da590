# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance sampling: one jitted scan over a table of coefficients.

Every scheduler offered here is, per step, a fixed linear combination of the current
latents, the model's outputs and earlier outputs. `schedule` computes the coefficients
in float64 from a diffusers scheduler config; one step function then serves them all and
equals the PyTorch schedulers. (diffusers' Flax schedulers do not: they ignore
`timestep_spacing` and `rescale_betas_zero_snr`, and end DPM-Solver++ at t=0 with noise
left, where PyTorch ends at sigma 0.)
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gift_jax import sharding
from gift_jax.config import UserError
from gift_jax.models import hooks
from gift_jax.models.kernels import Kernels
from gift_jax.models.stable_diffusion import alphas_cumprod

SCHEDULERS = ("ddim", "pndm", "dpmsolver++")
_CLASSES = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "DPMSolverMultistepScheduler": "dpmsolver++",
}
_HISTORY = 4
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
        on_h = tuple(on_h) + (0.0,) * (_HISTORY - len(on_h))
        defaults = {"from_x": 0.0, "from_m": 0.0, "on_x": 0.0, "on_m": 0.0}
        row = defaults | scalars
        self._rows.append(Schedule(t, on_h=on_h, push=push, restart=restart, **row))

    def done(self):
        columns = Schedule(*zip(*self._rows, strict=True))
        dtypes = Schedule(np.int32, *[np.float32] * 5, bool, bool)
        return Schedule(
            *(np.asarray(c, d) for c, d in zip(columns, dtypes, strict=True))
        )


# --- coefficients ---------------------------------------------------------------------


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
    return table(config, steps, alphas_cumprod(config))


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


# --- sampling -------------------------------------------------------------------------


def initial_latents(key, n, shape, first=0):
    """Returns standard normal latents, float32 "n C H W".

    Each example's noise depends on the key and its own index alone (first, first + 1,
    ...), so it is the same in any batch and on any number of devices.
    """
    return numbered_latents(key, jnp.arange(first, first + n), shape)


def numbered_latents(key, numbers_B, shape):
    """Returns the `initial_latents` of examples with these numbers, int "B"."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(numbers_B))
    return jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys)


def advance(row, clip, x, x_before, h, m):
    """Returns (x', h'), what one row of a `Schedule` makes of the latents, see there.

    Args: clip: x0's range, or None. x, x_before, m: float32 "B C H W": the latents, the
      latents before the last step, the guided output. h: "4 B C H W", the history.
    """
    p = row.from_x * x + row.from_m * m
    if clip is not None:
        p = jnp.clip(p, -clip, clip)
    h = jnp.where(row.push, jnp.concatenate([p[None], h[:-1]]), h)
    new = row.on_x * jnp.where(row.restart, x_before, x) + row.on_m * m
    for k in range(len(h)):  # not a matrix product: those may round on accelerators
        new = new + row.on_h[k] * h[k]
    return new, h


def sample_latents(
    unet,
    params,
    table,
    clip,
    guidance,
    z_BCHW,
    cond_BLD,
    uncond_BLD,
    trace=False,
    kernels=Kernels(),  # noqa: B008
):
    """Returns the latents, float32 "B C H W", that a scan over the table ends with.

    Args: table: a `Schedule`. clip: x0's range, or None. guidance: a traced scalar; see
      `make_sampler`. z_BCHW: initial noise. cond_BLD, uncond_BLD: text states; the
      unconditional ones None for no guidance. trace: return (the same, the latents that
      each row of the table starts from, float32 "N B C H W") instead. kernels: how the
      UNet's layers are computed.
    """
    B = z_BCHW.shape[0]
    c_BLD = cond_BLD
    if uncond_BLD is not None:
        uncond_BLD = jnp.broadcast_to(uncond_BLD, cond_BLD.shape)
        c_BLD = jnp.concatenate([uncond_BLD, cond_BLD])
    c_BLD = c_BLD.astype(unet.dtype)
    text = hooks.project_text(unet, params, c_BLD)  # once, not at every step

    def predict(x_BCHW, t):
        z = x_BCHW if uncond_BLD is None else jnp.concatenate([x_BCHW, x_BCHW])
        t_B = jnp.full((z.shape[0],), t)
        z = z.astype(unet.dtype)
        m, _ = hooks.apply_unet(unet, params, z, t_B, c_BLD, kernels=kernels, text=text)
        m = m.astype(jnp.float32)
        return m if uncond_BLD is None else m[:B] + guidance * (m[B:] - m[:B])

    def step(carry, row):
        x, x_before, h = carry
        new, h = advance(row, clip, x, x_before, h, predict(x, row.t))
        return (new, x, h), x if trace else None

    history = jnp.zeros((_HISTORY, *z_BCHW.shape), jnp.float32)
    (x_BCHW, _, _), before = jax.lax.scan(step, (z_BCHW, z_BCHW, history), table)
    return (x_BCHW, before) if trace else x_BCHW


def to_uint8(images_BHWC):
    """Returns uint8 "B H W 3" of float images in [-1, 1], rounded as diffusers does."""
    unit = jnp.clip(images_BHWC / 2 + 0.5, 0, 1)
    return jnp.round(unit * 255).astype(jnp.uint8)


def divide(size):
    """Returns (the mesh of this process's devices, pictures that divide over it).

    Args: size: pictures at once; it is rounded up.
    """
    devices = jax.local_devices()
    return sharding.lay_out(devices), -(-size // len(devices)) * len(devices)


def in_batches(count, size):
    """Yields `size` indices at a time, int "size"; the last is repeated to fill up.

    One shape, so one compilation.
    """
    for first in range(0, count, size):
        yield np.minimum(np.arange(first, first + size), count - 1)


def draw(
    model,
    unet_params,
    cond_NLD,
    uncond_1LD,
    key,
    numbers_N,
    batch,
    on_batch=None,
    **how,
):
    """Returns pictures, uint8 "N H W 3"; each batch is divided over the local devices.

    Args: model: a StableDiffusion; the decoder's parameters are its own. cond_NLD,
      uncond_1LD: text states, float32. key, numbers_N: of each picture's noise, see
      `initial_latents`. batch: pictures at once. on_batch: called with the number of
      pictures done. how: scheduler, steps and guidance, see `make_sampler`.
    """
    count = len(cond_NLD)
    mesh, size = divide(min(batch, count))
    sample = make_sampler(model, mesh=mesh, **how)
    cond_NLD, numbers_N = np.asarray(cond_NLD), np.asarray(numbers_N)
    params = unet_params, model.params["vae"]
    params, uncond_1LD = sharding.replicate(mesh, (params, uncond_1LD))
    done = []
    for some in in_batches(count, size):
        noise = numbered_latents(key, numbers_N[some], model.latent_shape)
        cond_BLD, noise = sharding.split(mesh, (cond_NLD[some], noise))
        done.append(np.asarray(sample(*params, cond_BLD, uncond_1LD, noise)))
        if on_batch:
            on_batch(int(some[-1]) + 1)
    return np.concatenate(done)[:count]


def make_sampler(model, scheduler=None, steps=25, guidance=7.5, decode=True, mesh=None):
    """Returns a jitted f(unet_params, vae_params, cond, uncond, key_or_latents).

    Args:
      model: a StableDiffusion; its modules and scheduler config are used, its
        parameters are not: pass them; one compilation serves every set of weights.
      scheduler: of `SCHEDULERS`; None is the folder's own.
      steps: denoising steps. guidance: scale of the classifier-free guidance, >= 1;
        1 is without, at half the cost (uncond is then ignored).
      decode: return images, else latents. mesh: what f's arrays lie on, see `divide`.
    Returns: f. cond: float32 "B L D"; uncond: "1 L D" or "B L D"; key_or_latents: a
      key, with which example i draws its own noise by its index, or noise "B C H W".
      f returns uint8 "B H W 3", or latents float32 "B C H W" if not `decode`.
    Raises: UserError for a bad scheduler, number of steps or guidance.
    Source: Ho & Salimans 2022, arXiv:2207.12598; diffusers `StableDiffusionPipeline`.
    """
    scheduler = scheduler or default_scheduler(model.scheduler_config)
    table = schedule(model.scheduler_config, scheduler, steps)
    clip = clip_range(model.scheduler_config, scheduler)
    if not guidance >= 1 or not np.isfinite(guidance):
        raise UserError(f"guidance={guidance} must be at least 1 (1: no guidance)")
    kernels = model.kernels.for_drawing(mesh)
    run = _compiled(model.unet, model.vae, clip, decode, kernels)

    def sampler(unet_params, vae_params, cond_BLD, uncond_BLD, key_or_latents):
        z_BCHW = key_or_latents
        if jnp.issubdtype(z_BCHW.dtype, jax.dtypes.prng_key):
            z_BCHW = initial_latents(z_BCHW, len(cond_BLD), model.latent_shape)
        return run(
            unet_params,
            vae_params if decode else None,
            table,
            jnp.float32(guidance),
            jnp.float32(model.scaling_factor),
            z_BCHW,
            cond_BLD,
            uncond_BLD if guidance > 1 else None,
        )

    return sampler


@functools.lru_cache(maxsize=16)
def _compiled(unet, vae, clip, decode, kernels):
    """One program for every guidance scale and every scheduler of equal length."""

    def run(unet_params, vae_params, table, scale, vae_scale, z_BCHW, cond, uncond):
        z_BCHW = sample_latents(
            unet, unet_params, table, clip, scale, z_BCHW, cond, uncond, kernels=kernels
        )
        if not decode:
            return z_BCHW
        z_BCHW = (z_BCHW / vae_scale).astype(vae.dtype)
        x_BCHW = hooks.apply_vae_decode(vae, vae_params, z_BCHW)
        return to_uint8(jnp.transpose(x_BCHW, (0, 2, 3, 1)).astype(jnp.float32))

    return jax.jit(run)
