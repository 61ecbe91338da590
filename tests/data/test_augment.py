# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gift_jax.data import augment

KEY = jax.random.key(0)
YES = jnp.ones(16, bool)


@pytest.fixture
def images():
    """float32 "16 24 24 3": random squares on white."""
    inner = jax.random.uniform(KEY, (16, 12, 12, 3), minval=-1.0, maxval=1.0)
    return jnp.pad(inner, ((0, 0), (6, 6), (6, 6), (0, 0)), constant_values=1.0)


def test_augment_of_nothing_is_the_identity(images):
    out = augment.augment(KEY, images, YES, flip=0, shift=0, scale=0)
    np.testing.assert_array_equal(out, images)


def test_augment_mirrors_only_where_allowed(images):
    allowed = jnp.arange(16) % 2 == 0
    out = augment.augment(KEY, images, allowed, flip=1.0, shift=0, scale=0)
    assert not np.array_equal(images, images[:, :, ::-1])
    np.testing.assert_array_equal(out[::2], images[::2, :, ::-1])
    np.testing.assert_array_equal(out[1::2], images[1::2])


def test_augment_mirrors_about_as_often_as_asked():
    images = jnp.tile(jnp.linspace(-1, 1, 4)[None, None, :, None], (400, 1, 1, 1))
    yes = jnp.ones(400, bool)
    out = augment.augment(KEY, images, yes, flip=0.5, shift=0, scale=0)
    mirrored = (out[:, 0, 0, 0] > 0).mean()
    assert 0.4 < mirrored < 0.6


def test_augment_shift_keeps_mass_and_enters_white(images):
    out = augment.augment(KEY, images, YES, flip=0, shift=4, scale=0)
    assert not np.array_equal(out, images)
    ink = (1.0 - images).sum((1, 2, 3))  # nothing leaves the frame here
    np.testing.assert_allclose((1.0 - out).sum((1, 2, 3)), ink, rtol=1e-4)
    np.testing.assert_allclose(out[:, 0], 1.0, atol=1e-6)
    center = _center(out) - _center(images)
    assert np.abs(center).max() <= 4.01
    assert np.abs(center).max() > 2.0


def test_augment_scale_keeps_the_center_and_changes_the_size(images):
    ink = (1.0 - images).sum((1, 2, 3))
    flat = jnp.where(images < 1.0, -1.0, images)  # one color: the center is exact
    out = augment.augment(KEY, flat, YES, flip=0, shift=0, scale=0.2)
    np.testing.assert_allclose(_center(out), _center(flat), atol=0.05)
    area = (1.0 - out).sum((1, 2, 3)) / (1.0 - flat).sum((1, 2, 3))
    assert area.min() < 0.9 < 1.1 < area.max()
    assert area.min() > 0.8**2 - 0.05 and area.max() < 1.2**2 + 0.05
    assert (ink > 0).all()


def test_augment_rotation_keeps_ink_and_center(images):
    flat = jnp.where(images < 1.0, -1.0, images)
    out = augment.augment(KEY, flat, YES, flip=0, shift=0, scale=0, rotate=30)
    np.testing.assert_allclose(_center(out), _center(flat), atol=0.05)
    ink = (1.0 - flat).sum((1, 2, 3))
    np.testing.assert_allclose((1.0 - out).sum((1, 2, 3)), ink, rtol=0.05)
    assert not np.allclose(out, flat, atol=0.5)
    none = augment.augment(KEY, flat, YES, flip=0, shift=0, scale=0, rotate=1e-6)
    np.testing.assert_allclose(none, flat, atol=1e-4)


def test_augment_color_keeps_white_and_shapes(images):
    out = augment.augment(KEY, images, YES, flip=0, shift=0, scale=0, color=1.0)
    white = (images == 1.0).all(-1)
    assert white.any() and not white.all()
    np.testing.assert_allclose(out[white], 1.0, atol=1e-6)
    change = jnp.abs(out - images).max((1, 2, 3))
    assert len(np.unique(change)) == len(images) and change.max() > 0.3
    assert out.min() >= -1.0001 and out.max() <= 1.0001
    slight = augment.augment(KEY, images, YES, flip=0, shift=0, scale=0, color=0.1)
    assert jnp.abs(slight - images).max() < 0.3 * change.max()


def test_augment_draws_by_index_and_not_by_place(images):
    whole = augment.augment(KEY, images, YES)
    half = augment.augment(KEY, images[8:], YES[8:], index_B=jnp.arange(8, 16))
    unindexed = augment.augment(KEY, images[8:], YES[8:])
    np.testing.assert_allclose(half, whole[8:], atol=1e-6)
    assert not np.allclose(unindexed, whole[8:], atol=1e-3)


def test_augment_runs_under_jit_and_stays_in_range(images):
    out = jax.jit(augment.augment)(KEY, images, YES)
    np.testing.assert_allclose(out, augment.augment(KEY, images, YES), atol=1e-5)
    assert out.shape == images.shape and out.dtype == jnp.float32
    assert out.min() >= -1.0001 and out.max() <= 1.0001


def _center(images):
    """Center of ink of each picture, "B 2", pixels."""
    ink = np.asarray(1.0 - images).sum(-1)
    rows = (ink.sum(2) * np.arange(ink.shape[1])).sum(1) / ink.sum((1, 2))
    cols = (ink.sum(1) * np.arange(ink.shape[2])).sum(1) / ink.sum((1, 2))
    return np.stack([rows, cols], axis=1)
