# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance sampling: one jitted scan over a table of coefficients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

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


def noise_keys(key, numbers_B):
    """Returns uint32 "B 2": of each example, the key of the noise its steps draw.

    Other noise than the `initial_latents`, and as these the same in any batch.
    """
    key = jax.random.fold_in(key, 2**32 - 1)  # no example has this number
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(numbers_B))
    return jax.random.key_data(keys)


def _row_noise(keys_B2, row, shape):
    """Returns N(0, 1), float32 "B ...", that a row of a schedule adds."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(
        jax.random.wrap_key_data(keys_B2), row
    )
    return jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys)


def sample_latents(
    network,
    params,
    table,
    guidance,
    z_BCHW,
    cond,
    uncond,
    keys_B2=None,
    trace=False,
):
    """Returns the latents, float32 "B C H W", that a scan over the table ends with.

    Args: network: a model's, with `with_cond`. table: a `Schedule`, float32. guidance:
      a traced scalar; see `make_sampler`. z_BCHW: initial noise. cond, uncond: "B ..."
      and "1 ..." or "B ..."; the unconditional one None for no guidance. keys_B2: of
      `noise_keys`; None draws no noise. trace: return (the same, the latents that each
      row of the table starts from, float32 "N B C H W") instead.
    """
    B = z_BCHW.shape[0]
    if uncond is not None:

        def join(none, some):
            return jnp.concatenate([jnp.broadcast_to(none, some.shape), some])

        cond = jax.tree.map(join, uncond, cond)
    denoise = network.with_cond(params, cond)

    def predict(x_BCHW, t):
        z = x_BCHW if uncond is None else jnp.concatenate([x_BCHW, x_BCHW])
        m = denoise(z, jnp.full((z.shape[0],), t)).astype(jnp.float32)
        return m if uncond is None else m[:B] + guidance * (m[B:] - m[:B])

    def step(registers, numbered_row):
        row, i = numbered_row
        x, noise = registers[0], None
        if keys_B2 is not None:
            noise = _row_noise(keys_B2, i, x.shape[1:])
        m = predict(row.scale * x, row.t)
        return schedules.advance(row, registers, m, noise), x if trace else None

    registers = schedules.start(z_BCHW.astype(jnp.float32))
    rows = table, jnp.arange(len(table.t))
    registers, before = jax.lax.scan(step, registers, rows)
    return (registers[0], before) if trace else registers[0]


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
    cond,
    uncond,
    key,
    numbers_N,
    batch,
    on_batch=None,
    **options,
):
    """Returns images, uint8 "N H W 3"; each batch is divided over the local devices.

    Args: model: see models/base.py; drawn with its own parameters. cond, uncond: of the
      images, "N ...", and "1 ...", see `encode_text`. key, numbers_N: of
      each image's noise, see `initial_latents`. batch: images at once. on_batch: called
      with the number of images done. options: scheduler, steps and guidance, see
      `make_sampler`.
    """
    count = len(numbers_N)
    mesh, size = divide(min(batch, count))
    sample = make_sampler(model, mesh=mesh, **options)
    params = model.denoiser_params, model.vae_params
    params, uncond = sharding.replicate(mesh, (params, uncond))
    firsts = iter(range(0, count, size))

    def sample_batch(rows):
        cond_B, numbers_B = rows
        noise = numbered_latents(key, numbers_B, model.latent_shape)
        keys = noise_keys(key, numbers_B)
        cond_B, noise, keys = sharding.put_batch(mesh, (cond_B, noise, keys))
        images = np.asarray(sample(*params, cond_B, uncond, noise, keys))
        if on_batch:
            on_batch(min(next(firsts) + size, count))
        return images

    arrays = jax.tree.map(np.asarray, (cond, numbers_N))
    return map_batches(sample_batch, arrays, size)


def make_sampler(model, scheduler="", steps=25, guidance=7.5, decode=True, mesh=None):
    """Returns a jitted f(params, vae_params, cond, uncond, key_or_latents, keys).

    Args:
      model: see models/base.py; its network, autoencoder and scheduler config are used,
        its parameters are not: pass the denoiser's and the VAE's; one compilation
        serves every set of weights.
      scheduler: of `SCHEDULERS`; "" is the folder's own.
      steps: denoising steps. guidance: scale of the classifier-free guidance, >= 1;
        1 is without, at half the cost (uncond is then ignored).
      decode: return images, else latents. mesh: what f's arrays lie on, see `divide`.
    Returns: f. cond: "B ..."; uncond: "1 ..." or "B ..."; key_or_latents: a key, with
      which example i draws its own noise by its index, or noise "B C H W".
      keys: of `noise_keys`, needed with noise where the scheduler draws some at each
      step. f returns uint8 "B H W 3", or latents float32 "B C H W" if not `decode`.
    Raises: UserError for a bad scheduler, number of steps or guidance.
    Source: Ho & Salimans 2022, arXiv:2207.12598; diffusers `StableDiffusionPipeline`.
    """
    table = schedules.schedule(model.scheduler_config, scheduler, steps)
    draws_noise = schedules.is_stochastic(table)
    table = jax.tree.map(np.float32, table)
    if not guidance >= 1 or not np.isfinite(guidance):
        raise UserError(f"guidance={guidance} must be at least 1 (1: no guidance)")
    model = model.with_kernels(model.kernels.for_sampling(mesh))
    run = _compiled(model.network, model.autoencoder if decode else None)

    def sampler(params, vae_params, cond, uncond, key_or_latents, keys_B2=None):
        z_BCHW = key_or_latents
        if jnp.issubdtype(z_BCHW.dtype, jax.dtypes.prng_key):
            count = len(jax.tree.leaves(cond)[0])
            keys_B2 = noise_keys(z_BCHW, jnp.arange(count))
            z_BCHW = initial_latents(z_BCHW, count, model.latent_shape)
        if draws_noise and keys_B2 is None:
            raise ValueError("this scheduler draws noise: give a key, or keys")
        return run(
            params,
            vae_params if decode else None,
            table,
            jnp.float32(guidance),
            model.latent_scale,
            z_BCHW,
            cond,
            uncond if guidance > 1 else None,
            keys_B2 if draws_noise else None,
        )

    return sampler


@functools.lru_cache(maxsize=16)
def _compiled(network, autoencoder):
    """One program for every guidance scale and every scheduler of equal length.

    Another one for those that draw noise at each step. Args: autoencoder: None returns
    latents.
    """

    def run(params, vae_params, table, guidance, scale, z_BCHW, cond, uncond, keys_B2):
        z_BCHW = sample_latents(
            network, params, table, guidance, z_BCHW, cond, uncond, keys_B2
        )
        if autoencoder is None:
            return z_BCHW
        return to_uint8(autoencoder.decode_scaled(vae_params, scale, z_BCHW))

    return jax.jit(run)
