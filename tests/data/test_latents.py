# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gift_jax.data import latents
from gift_jax.data.pairs import Pairs
from gift_jax.runtime.errors import UserError

KEY = jax.random.key(0)


@pytest.fixture
def data():
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    names = ["owl", "bomb", "owl", "bomb", "key"]
    prompts = [f"a {name}" for name in names]
    return Pairs(images, prompts, names, ["noto"] * 5, np.ones(5, bool))


def encode_images(images):
    return images * 2.0, jnp.abs(images)


def encode_prompts(prompts):
    lengths = jnp.asarray([[len(p), ord(p[-1])] for p in prompts], jnp.float32)
    return {"states": jnp.tile(lengths[:, None], (1, 3, 1))}


def test_cache_holds_each_pair_encoded_in_order(data):
    cache = latents.cache_latents(encode_images, encode_prompts, data, batch_size=2)
    images = data.images / 127.5 - 1.0
    np.testing.assert_allclose(cache["mean"], images * 2, atol=1e-6)
    np.testing.assert_allclose(cache["std"], np.abs(images), atol=1e-6)
    expected = encode_prompts(data.prompts)["states"]
    np.testing.assert_array_equal(cache["cond"][:]["states"], expected)
    table = cache["cond"].table["states"]
    assert len(table) == 3  # prompts, for five pairs
    assert cache["concept"].tolist() == [0, 1, 0, 1, 2]
    assert cache["mean"].dtype == table.dtype == np.float32


def test_cache_encodes_batches_of_one_size_and_prompts_once(data):
    sizes, calls = set(), []

    def images_spy(images):
        sizes.add(images.shape)
        return encode_images(images)

    def prompts_spy(prompts):
        calls.append(prompts)
        return encode_prompts(prompts)

    latents.cache_latents(
        images_spy, prompts_spy, data, batch_size=2, copies=2, key=KEY
    )
    assert sizes == {(2, 8, 8, 3)}
    assert calls == [["a owl", "a bomb"], ["a key", "a key"]]


def test_cache_copies_are_augmented_after_the_first(data):
    plain = latents.cache_latents(encode_images, encode_prompts, data)
    cache = latents.cache_latents(
        encode_images, encode_prompts, data, copies=3, key=KEY
    )
    assert len(cache["mean"]) == len(cache["cond"]) == len(cache["concept"]) == 15
    np.testing.assert_array_equal(cache["mean"][:5], plain["mean"])
    assert not np.allclose(cache["mean"][5:10], plain["mean"], atol=1e-2)
    assert not np.allclose(cache["mean"][5:10], cache["mean"][10:], atol=1e-2)


def test_cache_does_not_depend_on_batch_size(data):
    kwargs = dict(copies=2, key=KEY)
    one = latents.cache_latents(
        encode_images, encode_prompts, data, batch_size=1, **kwargs
    )
    many = latents.cache_latents(
        encode_images, encode_prompts, data, batch_size=8, **kwargs
    )
    for name, array in one.items():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
            array[:],
            many[name][:],
        )


def test_cache_refuses_no_data_and_no_copies(data):
    with pytest.raises(UserError, match="copies=0"):
        latents.cache_latents(encode_images, encode_prompts, data, copies=0)
    with pytest.raises(ValueError, match="key"):
        latents.cache_latents(encode_images, encode_prompts, data, copies=2)
    nothing = Pairs(data.images[:0], [], [], [], np.ones(0, bool))
    with pytest.raises(UserError, match="no pictures"):
        latents.cache_latents(encode_images, encode_prompts, nothing)
