# SPDX-License-Identifier: Apache-2.0
"""Each way to compute attention against its definition, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_model import relative_error

from gift_jax.models.ops import attention
from gift_jax.models.ops.kernels import Kernels
from gift_jax.training import sharding


def draw(rng, dtype="float32", tokens=64, keys=64, heads=2, size=8):
    shapes = [(2, tokens, heads, size)] + [(2, keys, heads, size)] * 2
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def distance(a, b) -> float:
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def value_and_grads(kernels: Kernels, qkv):
    def loss(*qkv):
        out = kernels.attend(*qkv)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)
    return out, *grads


def defined(q, k, v, mask=True):
    """softmax(q k' / sqrt(D)) v in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * mask
    return np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(attention, "_WHOLE_SCORES_BYTES", 2000)
    monkeypatch.setattr(attention, "_CHUNK_SCORES_BYTES", 2000)


def test_a_causal_query_sees_no_later_key(rng):
    qkv = draw(rng)
    mask = np.tril(np.ones((64, 64)))
    ours = attention.attention_reference(*qkv, causal=True)
    np.testing.assert_allclose(ours, defined(*qkv, mask), atol=1e-5)
    assert distance(ours, defined(*qkv)) > 0.1


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-3)])
@pytest.mark.parametrize("keys", [64, 17])
def test_chunks_equal_the_whole(rng, small_chunks, dtype, tolerance, keys):
    qkv = draw(rng, dtype, keys=keys)
    program = str(jax.make_jaxpr(Kernels("chunked").attend)(*qkv))
    assert "scan" in program
    assert "scan" not in str(jax.make_jaxpr(Kernels("plain").attend)(*qkv))
    ours = value_and_grads(Kernels("chunked"), qkv)
    plain = value_and_grads(Kernels("plain"), qkv)
    assert distance(plain[0], defined(*qkv)) < 2 * tolerance
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == jnp.dtype(dtype)
        assert distance(a, b) < 2 * tolerance
    assert distance(ours[0], plain[0]) < tolerance


def test_few_scores_are_computed_at_once(rng):
    assert "scan" not in str(jax.make_jaxpr(Kernels("chunked").attend)(*draw(rng)))


def test_chunks_are_divided_over_a_mesh(rng, small_chunks):
    qkv = draw(rng)
    plain = Kernels("plain").attend(*qkv)
    for axis, spec in (("data", ("data",)), ("tensor", (None, None, "tensor"))):
        axes = dict.fromkeys(sharding.AXES, 1) | {axis: 2}
        mesh = sharding.make_mesh(jax.devices()[:2], axes)
        kernels = Kernels("chunked").on(mesh)
        where = NamedSharding(mesh, PartitionSpec(*spec))
        placed = jax.device_put(qkv, where)
        compiled = jax.jit(kernels.attend).lower(*placed).compile()
        assert "all-" not in compiled.as_text()  # reduce, gather, to-all
        out = compiled(*placed)
        assert out.sharding.num_devices == 2
        np.testing.assert_allclose(out, plain, atol=1e-6)


def second_derivatives(kernels: Kernels, qkv, towards):
    """The Hessian times a vector, forward over reverse and reverse over reverse."""

    def grads(*qkv):
        def loss(*qkv):
            return jnp.sum(jnp.sin(kernels.attend(*qkv)))

        return jax.grad(loss, argnums=(0, 1, 2))(*qkv)

    forward = jax.jvp(grads, qkv, towards)[1]
    return *forward, *jax.vjp(grads, *qkv)[1](towards)


def test_chunks_have_a_second_derivative(rng, small_chunks):
    qkv, towards = (tuple(draw(rng, keys=17)) for _ in range(2))
    ours, plain = (
        jax.jit(functools.partial(second_derivatives, Kernels(kind)))(qkv, towards)
        for kind in ("chunked", "plain")
    )
    for a, b in zip(ours, plain, strict=True):
        assert 0 < distance(a, b) < 1e-5


def test_scores_are_summed_in_float32(rng):
    q, k, v = draw(rng, "bfloat16", size=64)
    exact = defined(q, k, v)
    coarse = jnp.einsum("bnhd,bmhd->bhnm", q, k) * 64**-0.5  # rounded to bfloat16
    coarse = jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(coarse), v)
    ours = relative_error(Kernels("plain").attend(q, k, v), exact)
    assert ours < 0.8 * relative_error(coarse, exact)


@pytest.mark.parametrize("parts", [1, 2])
def test_flash_equals_plain(rng, monkeypatch, parts):
    qkv = draw(rng, tokens=256, keys=256, size=40)
    sums = 2 * 2 * 256 * 128 * 4  # over 128 lanes each, of 2 examples of 2 heads
    monkeypatch.setattr(attention, "_FLASH_SUMS_BYTES", sums // parts)
    program = str(jax.make_jaxpr(lambda *qkv: Kernels("flash").attend(*qkv))(*qkv))
    assert program.count("optimization_barrier") == parts - 1
    ours = value_and_grads(Kernels("flash"), qkv)
    for a, b in zip(ours, value_and_grads(Kernels("plain"), qkv), strict=True):
        assert 0 < distance(a, b) < 1e-5


@pytest.mark.parametrize("tokens", [130, 515])
def test_flash_pads_tokens_that_lanes_do_not_divide(rng, tokens):
    """As of image and text together: 4,096 and 333."""
    qkv = draw(rng, tokens=tokens, keys=tokens, size=64)
    kernels = Kernels("flash")
    assert kernels.attention_for(*qkv[:2]) == "flash"
    ours = value_and_grads(kernels, qkv)
    for a, b in zip(ours, value_and_grads(Kernels("plain"), qkv), strict=True):
        assert a.shape == b.shape and 0 < distance(a, b) < 1e-5


def test_cudnn_pads_an_odd_number_of_tokens(rng, monkeypatch):
    """Its arguments, computed by XLA, which masks as it does."""
    calls, attend = [], jax.nn.dot_product_attention

    def spy(*qkv, implementation, **lengths):
        calls.append(qkv[0].shape[1])
        assert implementation == "cudnn"
        return attend(*qkv, **lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    for tokens in (63, 64):
        qkv = draw(rng, "bfloat16", tokens=tokens, keys=tokens)
        exact = value_and_grads(Kernels("plain"), [a.astype("float32") for a in qkv])
        kernels = Kernels("cudnn", platform="gpu")
        for a, b in zip(value_and_grads(kernels, qkv), exact, strict=True):
            assert a.shape == b.shape and distance(a, b) < 6e-3
    assert calls == [64, 64]


@pytest.mark.parametrize("size", [40, 64])
def test_flash_is_as_exact_as_plain_in_bfloat16(rng, size):
    qkv = draw(rng, "bfloat16", tokens=256, keys=256, size=size)
    exact = value_and_grads(Kernels("plain"), [a.astype("float32") for a in qkv])
    ours, plain = (value_and_grads(Kernels(kind), qkv) for kind in ("flash", "plain"))
    for a, b, expected in zip(ours, plain, exact, strict=True):
        # 40**-0.5 times a query is rounded once more; 64**-0.5 is a power of two
        limit = 1.6 if size == 40 else 1.05
        assert distance(a, expected) < limit * distance(b, expected)
        assert 0 < distance(b, expected) < 3e-3
    assert distance(ours[0], plain[0]) < 4e-3


def test_flash_is_divided_over_a_mesh(rng, monkeypatch):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )

    shapes = []
    make = splash.make_splash_mha_single_device

    def spy(mask, **options):
        shapes.append(mask.shape)
        return make(mask, **options)

    monkeypatch.setattr(splash, "make_splash_mha_single_device", spy)
    qkv = draw(rng, tokens=128, keys=128, heads=2, size=8)
    plain = Kernels("plain").attend(*qkv)
    for sizes, heads in (((2, 1, 1), 2), ((1, 1, 2), 1)):
        axes = dict(zip(sharding.AXES, sizes, strict=True))
        kernels = Kernels("flash").on(sharding.make_mesh(jax.devices()[:2], axes))
        assert kernels.device == "cpu"
        ours = jax.jit(kernels.attend)(*qkv)
        assert shapes[-1] == (heads, 128, 128)  # of one device
        assert ours.sharding.num_devices == 2
        assert distance(ours, plain) < 1e-5


@pytest.mark.parametrize("choice", ["auto", "cudnn"])
def test_gradient_is_traced_where_cudnn_has_none(rng, monkeypatch, choice):
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91_000)
    kernels = Kernels(choice, platform="gpu")
    kinds = []
    for tokens, keys in ((256, 64), (333, 333), (256, 77)):
        qkv = draw(rng, "bfloat16", tokens=tokens, keys=keys, size=40)
        kinds.append(kernels.attention_for(*qkv[:2]))
        shapes = jax.eval_shape(functools.partial(value_and_grads, kernels), qkv)
        assert [a.shape for a in shapes] == [a.shape for a in (qkv[0], *qkv)]
    assert kinds == ["cudnn", "cudnn", "plain"]
    with pytest.raises(NotImplementedError, match="Q 256, KV 77"):
        jax.eval_shape(jax.grad(_sum_of_cudnn), *qkv)


def _sum_of_cudnn(*qkv):
    return jax.nn.dot_product_attention(*qkv, implementation="cudnn").sum()


@pytest.mark.parametrize(
    "platform, tokens, keys, dtype, expected",
    [
        ("tpu", 4096, 4096, "bfloat16", "flash"),
        ("tpu", 4096, 77, "bfloat16", "plain"),
        ("tpu", 4429, 4429, "bfloat16", "flash"),
        ("tpu", 2304, 2304, "bfloat16", "plain"),
        ("tpu", 256, 256, "bfloat16", "plain"),
        ("gpu", 256, 256, "bfloat16", "cudnn"),
        ("cuda", 256, 256, "bfloat16", "cudnn"),
        ("gpu", 4429, 4429, "bfloat16", "cudnn"),
        ("gpu", 256, 77, "bfloat16", "plain"),  # its gradient is refused
        ("gpu", 256, 77, "float32", "plain"),
        ("cpu", 4096, 4096, "float32", "chunked"),
        ("metal", 4096, 4096, "float32", "plain"),
    ],
)
def test_auto_attention_is_chosen_by_platform(platform, tokens, keys, dtype, expected):
    q = jax.ShapeDtypeStruct((2, tokens, 8, 40), dtype)
    k = jax.ShapeDtypeStruct((2, keys, 8, 40), dtype)
    kernels = Kernels(platform=platform)
    assert kernels.attention_for(q, k) == expected
    twice = kernels.twice_differentiable().attention_for(q, k)
    assert twice == ("chunked" if platform == "cpu" else "plain")
