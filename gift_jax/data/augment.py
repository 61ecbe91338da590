# SPDX-License-Identifier: Apache-2.0
"""Augmentation on the device: mirror, shift, scale, rotate, color. Pure, jittable."""

import functools

import jax
import jax.numpy as jnp

WHITE = 1.0  # the background, in [-1, 1]


def augment(
    key,
    images_BHWC,
    flip_B,
    *,
    flip=0.5,
    shift=4,
    scale=0.1,
    rotate=0.0,
    color=0.0,
    index_B=None,
):
    """Returns the images changed at random, float32 "B H W C".

    Args: key: one PRNG key. images_BHWC: float32 "B H W C" in [-1, 1]. flip_B: bool
      "B", whether an example may be mirrored. flip: probability of mirroring one that
      may. shift: largest move in pixels, along each axis. scale: the factor is uniform
      in [1 - scale, 1 + scale], about the center. rotate: largest turn in degrees.
      color: largest share of what `_recolored` returns. index_B: int32 "B", each
      example's index in the global batch (default: its place here); with it the draw
      does not depend on how a batch is divided between devices.
    Returns: what leaves the frame is lost and what enters is white. With every strength
      zero the images come back bit for bit.
    """
    if index_B is None:
        index_B = jnp.arange(images_BHWC.shape[0])
    augment_one = functools.partial(
        _augment_one, flip=flip, shift=shift, scale=scale, rotate=rotate, color=color
    )
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, index_B)
    return jax.vmap(augment_one)(keys_B, images_BHWC, flip_B)


def _augment_one(key, image_HWC, may_flip, *, flip, shift, scale, rotate, color):
    k_flip, k_shift, k_scale = jax.random.split(key, 3)
    if color:
        k_share, k_color = jax.random.split(jax.random.fold_in(key, 1))
        share = color * jax.random.uniform(k_share)
        image_HWC += share * (_recolored(k_color, image_HWC) - image_HWC)
    if flip:
        mirror = may_flip & jax.random.bernoulli(k_flip, flip)
        image_HWC = jnp.where(mirror, image_HWC[:, ::-1], image_HWC)
    if rotate:
        k_turn = jax.random.fold_in(key, 2)
        degrees = rotate * jax.random.uniform(k_turn, minval=-1.0, maxval=1.0)
        image_HWC = _turned(image_HWC, jnp.deg2rad(degrees))
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


def _turned(image_HWC, radians):
    """Returns the image turned about its center, bilinear, white outside."""
    H, W = image_HWC.shape[:2]
    y_H1, x_1W = jnp.arange(H)[:, None] - (H - 1) / 2, jnp.arange(W)[None] - (W - 1) / 2
    cos, sin = jnp.cos(radians), jnp.sin(radians)
    at = [cos * y_H1 - sin * x_1W + (H - 1) / 2, sin * y_H1 + cos * x_1W + (W - 1) / 2]

    def turn(channel_HW):
        return jax.scipy.ndimage.map_coordinates(channel_HW, at, 1, cval=0.0)

    return jax.vmap(turn, -1, -1)(image_HWC - WHITE) + WHITE


def _recolored(key, image_HWC):
    """Returns the image in other colors, as bright as it was or not; white stays white.

    Each channel becomes a random mixture of all, then the whole is darker or lighter.
    """
    k_mix, k_bright = jax.random.split(key)
    mix_CC = jax.random.dirichlet(k_mix, jnp.full(3, 0.7), (3,))
    bright = jax.random.uniform(k_bright, minval=0.5, maxval=1.4)
    ink_HWC = (WHITE - image_HWC) @ mix_CC.T  # 0: white; 2: black
    return WHITE - jnp.clip(bright * ink_HWC, 0.0, 2.0)
