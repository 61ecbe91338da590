# SPDX-License-Identifier: Apache-2.0
"""Light augmentation on the device: mirror, shift, scale. Pure and jittable."""

import functools

import jax
import jax.numpy as jnp

WHITE = 1.0  # the background, in [-1, 1]


def augment(key, images_BHWC, flip_B, *, flip=0.5, shift=4, scale=0.1, index_B=None):
    """Returns the images mirrored, moved and scaled at random, float32 "B H W C".

    Args: key: one PRNG key. images_BHWC: float32 "B H W C" in [-1, 1]. flip_B: bool
      "B", whether an example may be mirrored. flip: probability of mirroring one that
      may. shift: largest move in pixels, along each axis. scale: the factor is uniform
      in [1 - scale, 1 + scale], about the center. index_B: int32 "B", each example's
      index in the global batch (default: its place here); with it the draw does not
      depend on how a batch is divided between devices.
    Returns: what leaves the frame is lost and what enters is white. With flip, shift
      and scale all zero the images come back bit for bit.
    """
    if index_B is None:
        index_B = jnp.arange(images_BHWC.shape[0])
    augment_one = functools.partial(_augment_one, flip=flip, shift=shift, scale=scale)
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, index_B)
    return jax.vmap(augment_one)(keys_B, images_BHWC, flip_B)


def _augment_one(key, image_HWC, may_flip, *, flip, shift, scale):
    k_flip, k_shift, k_scale = jax.random.split(key, 3)
    if flip:
        mirror = may_flip & jax.random.bernoulli(k_flip, flip)
        image_HWC = jnp.where(mirror, image_HWC[:, ::-1], image_HWC)
    if not shift and not scale:
        return image_HWC
    move = jax.random.uniform(k_shift, (2,), minval=-1.0, maxval=1.0) * shift
    factor = 1.0 + jax.random.uniform(k_scale, (), minval=-1.0, maxval=1.0) * scale
    size = jnp.asarray(image_HWC.shape[:2], jnp.float32)
    moved_HWC = jax.image.scale_and_translate(
        image_HWC - WHITE,  # outside the frame counts as zero, that is white
        image_HWC.shape,
        (0, 1),
        jnp.broadcast_to(factor, (2,)),
        move + (1.0 - factor) * size / 2.0,  # keep the center in place
        method="linear",
        antialias=False,
    )
    return moved_HWC + WHITE
