# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance sampling: one jitted scan over a table of coefficients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gift_jax.models import sd
from gift_jax.models.batching import map_batches
from gift_jax.runtime.errors import UserError
from gift_jax.sampling import schedules
from gift_jax.training import sharding


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
):
    """Returns the latents, float32 "B C H W", that a scan over the table ends with.

    Args: table: a `Schedule`. clip: x0's range, or None. guidance: a traced scalar; see
      `make_sampler`. z_BCHW: initial noise. cond_BLD, uncond_BLD: text states; the
      unconditional ones None for no guidance. trace: return (the same, the latents that
      each row of the table starts from, float32 "N B C H W") instead.
    """
    B = z_BCHW.shape[0]
    c_BLD = cond_BLD
    if uncond_BLD is not None:
        uncond_BLD = jnp.broadcast_to(uncond_BLD, cond_BLD.shape)
        c_BLD = jnp.concatenate([uncond_BLD, cond_BLD])
    c_BLD = c_BLD.astype(unet.dtype)
    text = sd.project_text(unet, params, c_BLD)  # once, not at every step

    def predict(x_BCHW, t):
        z = x_BCHW if uncond_BLD is None else jnp.concatenate([x_BCHW, x_BCHW])
        t_B = jnp.full((z.shape[0],), t)
        z = z.astype(unet.dtype)
        m, _ = sd.apply_unet(unet, params, z, t_B, c_BLD, text=text)
        m = m.astype(jnp.float32)
        return m if uncond_BLD is None else m[:B] + guidance * (m[B:] - m[:B])

    def step(carry, row):
        x, x_before, h = carry
        new, h = advance(row, clip, x, x_before, h, predict(x, row.t))
        return (new, x, h), x if trace else None

    history = jnp.zeros((schedules.HISTORY, *z_BCHW.shape), jnp.float32)
    (x_BCHW, _, _), before = jax.lax.scan(step, (z_BCHW, z_BCHW, history), table)
    return (x_BCHW, before) if trace else x_BCHW


def to_uint8(images_BHWC):
    """Returns uint8 "B H W 3" of float images in [-1, 1], rounded as diffusers does."""
    unit = jnp.clip(images_BHWC / 2 + 0.5, 0, 1)
    return jnp.round(unit * 255).astype(jnp.uint8)


def divide(size):
    """Returns (the mesh of this process's devices, a batch size that divides over it).

    Args: size: images at once; it is rounded up.
    """
    devices = jax.local_devices()
    return sharding.make_mesh(devices), -(-size // len(devices)) * len(devices)


def in_batches(count, size):
    """Yields `size` indices at a time, int "size"; the last is repeated to fill up.

    One shape, so one compilation.
    """
    for first in range(0, count, size):
        yield np.minimum(np.arange(first, first + size), count - 1)


def sample_images(
    model,
    unet_params,
    cond_NLD,
    uncond_1LD,
    key,
    numbers_N,
    batch,
    on_batch=None,
    **options,
):
    """Returns images, uint8 "N H W 3"; each batch is divided over the local devices.

    Args: model: a StableDiffusion; the decoder's parameters are its own. cond_NLD,
      uncond_1LD: text states, float32. key, numbers_N: of each image's noise, see
      `initial_latents`. batch: images at once. on_batch: called with the number of
      images done. options: scheduler, steps and guidance, see `make_sampler`.
    """
    count = len(cond_NLD)
    mesh, size = divide(min(batch, count))
    sample = make_sampler(model, mesh=mesh, **options)
    params = unet_params, model.params["vae"]
    params, uncond_1LD = sharding.replicate(mesh, (params, uncond_1LD))
    firsts = iter(range(0, count, size))

    def sample_batch(rows):
        cond_BLD, numbers_B = rows
        noise = numbered_latents(key, numbers_B, model.latent_shape)
        cond_BLD, noise = sharding.put_batch(mesh, (cond_BLD, noise))
        images = np.asarray(sample(*params, cond_BLD, uncond_1LD, noise))
        if on_batch:
            on_batch(min(next(firsts) + size, count))
        return images

    arrays = np.asarray(cond_NLD), np.asarray(numbers_N)
    return map_batches(sample_batch, arrays, size)


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
    scheduler = scheduler or schedules.default_scheduler(model.scheduler_config)
    table = schedules.schedule(model.scheduler_config, scheduler, steps)
    clip = schedules.clip_range(model.scheduler_config, scheduler)
    if not guidance >= 1 or not np.isfinite(guidance):
        raise UserError(f"guidance={guidance} must be at least 1 (1: no guidance)")
    model = model.with_kernels(model.kernels.for_sampling(mesh))
    run = _compiled(model.unet, model.vae, clip, decode)

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
def _compiled(unet, vae, clip, decode):
    """One program for every guidance scale and every scheduler of equal length."""

    def run(unet_params, vae_params, table, scale, vae_scale, z_BCHW, cond, uncond):
        z_BCHW = sample_latents(
            unet, unet_params, table, clip, scale, z_BCHW, cond, uncond
        )
        if not decode:
            return z_BCHW
        z_BCHW = (z_BCHW / vae_scale).astype(vae.dtype)
        x_BCHW = sd.apply_vae_decode(vae, vae_params, z_BCHW)
        return to_uint8(jnp.transpose(x_BCHW, (0, 2, 3, 1)).astype(jnp.float32))

    return jax.jit(run)
