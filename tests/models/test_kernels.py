# SPDX-License-Identifier: Apache-2.0
"""Each way to compute a layer against the plain one."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_model import relative_error

from gift_jax.models import hooks, kernels
from gift_jax.models.kernels import Kernels
from gift_jax.models.sd import stable_diffusion
from gift_jax.training import sharding


def draw(rng, dtype="float32", tokens=64, keys=64, heads=2, size=8):
    shapes = [(2, tokens, heads, size)] + [(2, keys, heads, size)] * 2
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def distance(a, b) -> float:
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def assert_close(ours, theirs):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max() + 1e-8)


def value_and_grads(how: Kernels, qkv):
    def loss(*qkv):
        out = how.attend(*qkv)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)
    return out, *grads


def reference(q, k, v):
    """softmax(q k' / sqrt(D)) v in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-3)])
@pytest.mark.parametrize("keys", [64, 17])
def test_chunks_of_queries_equal_the_whole(rng, monkeypatch, dtype, tolerance, keys):
    qkv = draw(rng, dtype, keys=keys)
    monkeypatch.setattr(kernels, "_MAX_SCORES_BYTES", 2000)
    monkeypatch.setattr(kernels, "_SUMMED_KEYS", 64)
    program = str(jax.make_jaxpr(Kernels("chunked").attend)(*qkv))
    assert "scan" in program
    assert "scan" not in str(jax.make_jaxpr(Kernels("plain").attend)(*qkv))
    with_ones = "f32[2,1,9,64]"  # the values of a head, of 8 channels, and what sums
    assert (with_ones in program) == (dtype == "float32" and keys == 64)
    ours = value_and_grads(Kernels("chunked"), qkv)
    plain = value_and_grads(Kernels("plain"), qkv)
    assert distance(plain[0], reference(*qkv)) < 2 * tolerance
    for a, b in zip(ours, plain, strict=True):
        assert a.dtype == jnp.dtype(dtype)
        assert distance(a, b) < 2 * tolerance
    assert distance(ours[0], plain[0]) < tolerance


def test_heads_go_apart_where_they_lie_together(rng, monkeypatch):
    qkv = draw(rng)
    monkeypatch.setattr(kernels, "_MAX_SCORES_BYTES", 2**14)  # all have 2^16
    outs = []
    for devices, lengths in ((1, {"2"}), (2, {"1", "4"})):
        axes = dict(zip(sharding.AXES, (1, 1, devices), strict=True))
        mesh = sharding.make_mesh(jax.devices()[:devices], axes)
        how = Kernels("chunked").on(mesh)
        program = str(jax.make_jaxpr(how.attend)(*qkv))
        assert set(re.findall(r"length=(\d+)", program)) == lengths
        heads = NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
        placed = jax.device_put(qkv, heads)
        compiled = jax.jit(how.attend).lower(*placed).compile()
        assert "all-" not in compiled.as_text()  # reduce, gather, to-all
        outs.append(compiled(*placed))
        assert outs[-1].sharding.num_devices == devices
    plain = Kernels("plain").attend(*qkv)
    assert not np.array_equal(outs[0], plain)
    for out in outs:
        np.testing.assert_allclose(out, plain, atol=1e-6)


def second_derivatives(how: Kernels, qkv, towards):
    """The Hessian times a vector, forward over reverse and reverse over reverse."""

    def grads(*qkv):
        def loss(*qkv):
            return jnp.sum(jnp.sin(how.attend(*qkv)))

        return jax.grad(loss, argnums=(0, 1, 2))(*qkv)

    forward = jax.jvp(grads, qkv, towards)[1]
    return *forward, *jax.vjp(grads, *qkv)[1](towards)


def test_chunks_of_queries_have_a_second_derivative(rng, monkeypatch):
    qkv, towards = (tuple(draw(rng, keys=17)) for _ in range(2))
    monkeypatch.setattr(kernels, "_MAX_SCORES_BYTES", 2000)
    ours, plain = (
        jax.jit(functools.partial(second_derivatives, Kernels(kind)))(qkv, towards)
        for kind in ("chunked", "plain")
    )
    for a, b in zip(ours, plain, strict=True):
        assert 0 < distance(a, b) < 1e-5


def test_scores_are_summed_in_float32(rng):
    q, k, v = draw(rng, "bfloat16", size=64)
    exact = reference(q, k, v)
    coarse = jnp.einsum("bnhd,bmhd->bhnm", q, k) * 64**-0.5  # rounded to bfloat16
    coarse = jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(coarse), v)
    ours = relative_error(Kernels("plain").attend(q, k, v), exact)
    assert ours < 0.8 * relative_error(coarse, exact)


@pytest.mark.parametrize("parts", [1, 2])
def test_flash_equals_plain(rng, monkeypatch, parts):
    qkv = draw(rng, tokens=256, keys=256, size=40)
    sums = 2 * 2 * 256 * 128 * 4  # over 128 lanes each, of 2 examples of 2 heads
    monkeypatch.setattr(kernels, "_MAX_SUMS_BYTES", sums // parts)
    program = str(jax.make_jaxpr(lambda *qkv: Kernels("flash").attend(*qkv))(*qkv))
    assert program.count("optimization_barrier") == parts - 1
    ours = value_and_grads(Kernels("flash"), qkv)
    for a, b in zip(ours, value_and_grads(Kernels("plain"), qkv), strict=True):
        assert 0 < distance(a, b) < 1e-5


@pytest.mark.parametrize("size", [40, 64])
def test_flash_is_as_exact_as_plain_in_bfloat16(rng, size):
    qkv = draw(rng, "bfloat16", tokens=256, keys=256, size=size)
    exact = value_and_grads(Kernels("plain"), [a.astype("float32") for a in qkv])
    ours, plain = (value_and_grads(Kernels(how), qkv) for how in ("flash", "plain"))
    for a, b, wanted in zip(ours, plain, exact, strict=True):
        # 40**-0.5 times a query is rounded once more; 64**-0.5 is a power of two
        assert distance(a, wanted) < (1.6 if size == 40 else 1.05) * distance(b, wanted)
        assert 0 < distance(b, wanted) < 3e-3
    assert distance(ours[0], plain[0]) < 4e-3


@pytest.mark.parametrize("attention", ["auto", "cudnn"])
def test_gradient_is_traced_where_cudnn_has_none(rng, monkeypatch, attention):
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91_000)
    how = Kernels(attention, platform="gpu")
    kinds = []
    for keys in (64, 77):
        qkv = draw(rng, "bfloat16", tokens=256, keys=keys, size=40)
        kinds.append(how.attention_for(*qkv[:2]))
        shapes = jax.eval_shape(functools.partial(value_and_grads, how), qkv)
        assert [a.shape for a in shapes] == [a.shape for a in (qkv[0], *qkv)]
    assert kinds == ["cudnn", "plain"]
    with pytest.raises(NotImplementedError, match="Q 256, KV 77"):
        jax.eval_shape(jax.grad(_sum_of_cudnn), *qkv)


def _sum_of_cudnn(*qkv):
    return jax.nn.dot_product_attention(*qkv, implementation="cudnn").sum()


@pytest.mark.parametrize(
    "platform, tokens, keys, dtype, wanted",
    [
        ("tpu", 4096, 4096, "bfloat16", "flash"),
        ("tpu", 4096, 77, "bfloat16", "plain"),
        ("tpu", 256, 256, "bfloat16", "plain"),
        ("gpu", 256, 256, "bfloat16", "cudnn"),
        ("cuda", 256, 256, "bfloat16", "cudnn"),
        ("gpu", 256, 77, "bfloat16", "plain"),  # its gradient is refused
        ("gpu", 256, 77, "float32", "plain"),
        ("cpu", 4096, 4096, "float32", "chunked"),
        ("metal", 4096, 4096, "float32", "plain"),
    ],
)
def test_auto_attention_is_chosen_by_platform(platform, tokens, keys, dtype, wanted):
    q = jax.ShapeDtypeStruct((2, tokens, 8, 40), dtype)
    k = jax.ShapeDtypeStruct((2, keys, 8, 40), dtype)
    how = Kernels(platform=platform)
    assert how.attention_for(q, k) == wanted
    twice = how.twice_differentiable().attention_for(q, k)
    assert twice == ("chunked" if platform == "cpu" else "plain")


@pytest.mark.parametrize(
    "image, kernel, stride, matmul",
    [
        ((32, 8, 8, 192), (3, 3, 192, 64), 1, False),  # XLA's own is faster
        ((32, 4, 4, 128), (3, 3, 128, 128), 1, False),
        ((32, 4, 4, 128), (3, 3, 128, 128), 2, True),  # but not where 2x2 are made
        ((128, 2, 2, 128), (3, 3, 128, 128), 1, True),
        ((1, 32, 32, 320), (3, 3, 320, 320), 1, False),
        ((1, 16, 16, 640), (3, 3, 640, 640), 1, True),  # nor for so many channels
        ((1, 32, 32, 640), (3, 3, 640, 640), 1, True),
        ((1, 64, 64, 640), (1, 1, 640, 640), 1, True),  # nothing is unfolded
        ((8, 224, 224, 3), (16, 16, 3, 768), 16, True),
    ],
)
def test_few_positions_are_convolved_by_a_product_on_cpus(
    image, kernel, stride, matmul
):
    args = image, kernel, (stride, stride)
    assert Kernels(platform="cpu").takes_matmul(*args) == matmul
    assert not Kernels(platform="tpu").takes_matmul(*args)


def test_unknown_names_are_refused():
    for field in kernels.CHOICES:
        with pytest.raises(ValueError, match=f"{field}='winograd' must be one of"):
            Kernels(**{field: "winograd"})


# --- parts of the tokens --------------------------------------------------------------


@pytest.mark.parametrize("tokens, parts", [(64, 4), (60, 4), (17, 17), (16, 1)])
def test_parts_in_turn_equal_the_whole(rng, monkeypatch, tokens, parts):
    """Values, gradients and a gradient's gradient."""
    monkeypatch.setattr(kernels, "_TURN_TOKENS", 16)
    assert kernels.parts_of(tokens) == parts
    x = jnp.asarray(rng.normal(size=(2, tokens, 8)), jnp.float32)
    params = {n: jnp.asarray(rng.normal(size=(8, 8)), jnp.float32) for n in "ab"}
    sizes = []

    def compute(params, x):
        sizes.append(x.shape[1])
        return jnp.tanh(x @ params["a"]) @ params["b"]

    def of(layer):
        def loss(params, x):
            return jnp.mean(jnp.sin(layer(params, x)))

        def of_gradient(*args):
            gradients = jax.tree.leaves(jax.grad(loss, (0, 1))(*args))
            return sum(jnp.sum(g**2) for g in gradients)

        args = params, x
        return layer(*args), jax.grad(loss, (0, 1))(*args), jax.grad(of_gradient)(*args)

    in_turn = of(functools.partial(kernels.in_turn, compute))
    assert set(sizes) == {tokens // parts}
    assert_close(in_turn, of(compute))


def test_parts_in_turn_differentiate_what_they_close_over(rng, monkeypatch):
    monkeypatch.setattr(kernels, "_TURN_TOKENS", 16)
    x, a, b = (jnp.asarray(rng.normal(size=(2, 64, 1)), jnp.float32) for _ in range(3))
    a, b = a[0, 0, 0], b[0, 0, 0]

    def loss(a, b, in_turn):
        def compute(b, x):
            return jnp.tanh(a * x) * b

        out = kernels.in_turn(compute, b, x) if in_turn else compute(b, x)
        return jnp.mean(out**2)

    ours, theirs = (jax.grad(loss, (0, 1))(a, b, how) for how in (True, False))
    assert_close(ours, theirs)


# --- the whole UNet -------------------------------------------------------------------


def unet_inputs(rng, batch=2):
    z = rng.normal(size=(batch, 4, 8, 8)).astype(np.float32)
    c = rng.normal(size=(batch, 16, 32)).astype(np.float32)
    return z, np.asarray([3, 987][:batch], np.int32), c


def loss_of(model, inputs, how: Kernels, text=None):
    def loss(params):
        out, hiddens = hooks.apply_unet(
            model.unet, params, *inputs, ("transformer",), how, text
        )
        noised = sum(jnp.mean(h.astype(jnp.float32) ** 2) for h in hiddens.values())
        return jnp.mean(out.astype(jnp.float32) ** 2) + 0.1 * noised

    return loss


def residuals(loss, params):
    """Returns the number of floats kept for the backward pass, parameters not."""
    _, backward = jax.eval_shape(lambda p: jax.vjp(loss, p), params)
    shapes = [a.shape for a in jax.tree.leaves(params)]
    found = [a for a in jax.tree.leaves(backward) if a.shape not in shapes]
    return sum(a.size for a in found)


@pytest.mark.parametrize("remat", ["block", "full"])
def test_what_is_computed_again_is_the_same(tiny, rng, remat):
    inputs = unet_inputs(rng)
    params = tiny.params["unet"]
    losses = {how: loss_of(tiny, inputs, Kernels(remat=how)) for how in ("none", remat)}
    saved = {how: residuals(loss, params) for how, loss in losses.items()}
    assert saved[remat] < 0.2 * saved["none"]
    value, grads = {}, {}
    for how, loss in losses.items():
        value[how], grads[how] = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value[remat], value["none"], rtol=1e-6)
    assert_close(grads[remat], grads["none"])


@pytest.mark.parametrize("remat, stages", [("none", 0), ("block", 0), ("full", 5)])
def test_blocks_are_computed_again_one_at_a_time(tiny, rng, remat, stages):
    loss = loss_of(tiny, unet_inputs(rng), Kernels("plain", remat=remat))
    program = str(jax.make_jaxpr(loss)(tiny.params["unet"]))
    resnets, transformers, resizings = 8, 4, 2
    blocks = resnets + transformers + resizings
    expected = 0 if remat == "none" else blocks + stages
    assert program.count("differentiated=False") == expected


def test_the_unet_in_parts_of_tokens_is_the_same(tiny, rng, monkeypatch):
    inputs, params = unet_inputs(rng), tiny.params["unet"]
    how = Kernels("plain", norm="xla")
    plain = loss_of(tiny, inputs, how)
    counts = []
    for tokens in (64, 16):
        monkeypatch.setattr(kernels, "_TURN_TOKENS", tokens)
        loss = loss_of(tiny, inputs, dataclasses.replace(how, remat="block"))
        counts.append(str(jax.make_jaxpr(loss)(params)).count("custom_vjp_call["))
    assert counts[0] == 0
    assert counts[1] == 2 * 3  # two layers of each of the transformers at 8x8
    found, expected = (jax.jit(jax.value_and_grad(f))(params) for f in (loss, plain))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    assert_close(found[1], expected[1])


def test_the_unet_in_bfloat16_is_as_exact(tiny_folder, tiny, rng, monkeypatch):
    half = stable_diffusion.load(tiny_folder, jnp.bfloat16)
    inputs = unet_inputs(rng)
    monkeypatch.setattr(kernels, "_MAX_SCORES_BYTES", 2000)
    outs = {}
    for name, how in {
        "plain": Kernels("plain", "xla"),
        "chunked": Kernels("chunked", "xla"),
        "matmul": Kernels("plain", "matmul"),
    }.items():
        apply = jax.jit(functools.partial(hooks.apply_unet, half.unet, kernels=how))
        outs[name] = apply(half.params["unet"], *inputs)[0]
        assert outs[name].dtype == jnp.bfloat16
    exact, _ = hooks.apply_unet(tiny.unet, tiny.params["unet"], *inputs)
    errors = {name: distance(out, exact) for name, out in outs.items()}
    assert 1e-3 < errors["plain"] < 3e-2  # of a random network
    assert errors["chunked"] < 1.1 * errors["plain"]
    assert errors["matmul"] < 1.1 * errors["plain"]


def test_convolutions_agree_in_bfloat16(rng):
    conv = nn.Conv(32, (3, 3), padding=((1, 1), (1, 1)), dtype=jnp.bfloat16)
    x = jnp.asarray(rng.normal(size=(2, 8, 8, 64)), jnp.bfloat16)
    params = conv.init(jax.random.key(0), x)
    outs = {}
    for how in ("xla", "matmul"):
        with hooks.exact(Kernels(conv=how)):
            outs[how] = conv.apply(params, x)
    assert distance(outs["matmul"], outs["xla"]) < 2e-3


def test_text_projected_once_gives_the_same(tiny, rng):
    z, t, c = unet_inputs(rng)
    params = tiny.params["unet"]
    text = hooks.project_text(tiny.unet, params, c)
    assert len(text) == 4  # transformer blocks
    out, _ = hooks.apply_unet(tiny.unet, params, z, t, c)
    ours, _ = hooks.apply_unet(tiny.unet, params, z, t, c, text=text)
    np.testing.assert_allclose(ours, out, rtol=1e-5, atol=1e-6)
    ignored, _ = hooks.apply_unet(tiny.unet, params, z, t, 0 * c, text=text)
    np.testing.assert_array_equal(ignored, ours)
    assert (
        relative_error(hooks.apply_unet(tiny.unet, params, z, t, 0 * c)[0], out) > 0.1
    )


def test_flash_is_divided_over_a_mesh(rng, monkeypatch):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )

    asked = []
    make = splash.make_splash_mha_single_device

    def spied(mask, **how):
        asked.append(mask.shape)
        return make(mask, **how)

    monkeypatch.setattr(splash, "make_splash_mha_single_device", spied)
    qkv = draw(rng, tokens=128, keys=128, heads=2, size=8)
    plain = Kernels("plain").attend(*qkv)
    for sizes, heads in (((2, 1, 1), 2), ((1, 1, 2), 1)):
        axes = dict(zip(sharding.AXES, sizes, strict=True))
        how = Kernels("flash").on(sharding.make_mesh(jax.devices()[:2], axes))
        assert how.device == "cpu"
        ours = jax.jit(how.attend)(*qkv)
        assert asked[-1] == (heads, 128, 128)  # of one device
        assert ours.sharding.num_devices == 2
        np.testing.assert_allclose(ours, plain, atol=1e-5)
