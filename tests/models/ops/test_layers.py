# SPDX-License-Identifier: Apache-2.0
"""Norms, convolutions and activations against their references and definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import relative_error

from gift_jax.models.ops import activations, kernels
from gift_jax.models.ops.kernels import Kernels
from gift_jax.models.ops.layers import Conv, GroupNorm, LayerNorm


def test_unknown_names_are_refused():
    for field in kernels.CHOICES:
        with pytest.raises(ValueError, match=f"{field}='winograd' must be one of"):
            Kernels(**{field: "winograd"})


# --- norms ----------------------------------------------------------------------------

NORMS = {"layers": lambda k: LayerNorm(1e-6, kernels=k)}
NORMS["groups"] = lambda k: GroupNorm(8, 1e-5, kernels=k)


@pytest.mark.parametrize("shape", [(2, 6, 5, 24), (1, 30, 24), (3, 24)])
@pytest.mark.parametrize("build", NORMS.values(), ids=NORMS)
def test_norms_by_products_equal_the_reference(rng, build, shape):
    x, towards = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    params = build(Kernels()).init(jax.random.key(0), x)
    params = jax.tree.map(lambda p: p + rng.normal(size=p.shape), params)

    def results(choice):
        norm = build(Kernels(norm=choice))

        def loss(params, x):
            y = norm.apply(params, 3.0 + x)
            return jnp.sum(jnp.sin(y)), y

        def curvature(x):
            gradient = jax.grad(lambda x: loss(params, x)[0])
            return jax.jvp(gradient, (x,), (towards,))[1]

        grads, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return (y, grads, curvature(x)), str(jax.make_jaxpr(loss)(params, x))

    (ours, program), (theirs, reference) = results("matmul"), results("xla")
    assert "dot_general" in program
    assert "dot_general" not in reference
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("choice", ["xla", "matmul"])
def test_norms_keep_precision_far_from_zero(rng, choice):
    import flax.linen as nn

    x = (1000 + rng.normal(size=(2, 8, 8, 64))).astype(np.float32)
    mean = x.astype(np.float64).mean(-1, keepdims=True)
    expected = (x - mean) / np.sqrt(x.astype(np.float64).var(-1, keepdims=True) + 1e-6)
    norm = LayerNorm(1e-6, kernels=Kernels(norm=choice))
    params = norm.init(jax.random.key(0), x)
    of_flax = nn.LayerNorm(epsilon=1e-6).apply(params, x)
    assert relative_error(of_flax, expected) > 1e-3
    assert relative_error(norm.apply(params, x), expected) < 1e-4


# --- convolutions ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, stride, padding",
    [(3, 1, 1), (3, 2, 1), (3, 2, ((0, 1), (0, 1))), (1, 1, 0), (4, 4, 0), (1, 2, 0)],
)
def test_convolution_as_a_product_equals_xla(rng, size, stride, padding):
    x = rng.normal(size=(2, 9, 11, 5)).astype(np.float32)
    conv = {
        choice: Conv(6, size, stride, padding, kernels=Kernels(conv=choice))
        for choice in ("matmul", "xla")
    }
    params = conv["xla"].init(jax.random.key(0), x)
    program = {k: str(jax.make_jaxpr(c.apply)(params, x)) for k, c in conv.items()}
    assert "conv_general_dilated" in program["xla"]
    assert "conv_general_dilated" not in program["matmul"]

    def loss(params, x, name):
        y = conv[name].apply(params, x)
        return jnp.sum(jnp.sin(y)), y

    ours, theirs = (
        jax.grad(loss, (0, 1), has_aux=True)(params, x, name)
        for name in ("matmul", "xla")
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 2e-6, 3e-5), ours, theirs
    )


def test_convolutions_agree_in_bfloat16(rng):
    x = jnp.asarray(rng.normal(size=(2, 8, 8, 16)), jnp.bfloat16)
    outs = []
    for choice in ("matmul", "xla"):
        kernels = Kernels(conv=choice)
        conv = Conv(32, 3, 1, 1, dtype=jnp.bfloat16, kernels=kernels)
        outs.append(conv.apply(conv.init(jax.random.key(0), x), x))
        assert outs[-1].dtype == jnp.bfloat16
    a, b = (np.asarray(out, np.float32) for out in outs)
    assert np.linalg.norm(a - b) < 3e-3 * np.linalg.norm(b)


@pytest.mark.parametrize(
    "image, kernel, stride, product",
    [
        ((32, 8, 8, 192), (3, 3, 192, 64), 1, False),  # XLA's own is faster
        ((32, 4, 4, 128), (3, 3, 128, 128), 1, False),
        (
            (32, 4, 4, 128),
            (3, 3, 128, 128),
            2,
            True,
        ),  # but not of a 2x2 result
        ((128, 2, 2, 128), (3, 3, 128, 128), 1, True),
        ((1, 32, 32, 320), (3, 3, 320, 320), 1, False),
        ((1, 32, 32, 640), (3, 3, 640, 640), 1, True),  # nor for so many channels
        ((1, 64, 64, 640), (1, 1, 640, 640), 1, True),  # nothing is unfolded
        ((8, 224, 224, 3), (16, 16, 3, 768), 16, True),
    ],
)
def test_few_positions_are_convolved_by_a_product_on_cpus(
    image, kernel, stride, product
):
    arrays = [jax.ShapeDtypeStruct(shape, np.float32) for shape in (image, kernel)]

    def program(platform):
        def convolve(x, kernel):
            padding = ((0, 0), (0, 0))
            return Kernels(platform=platform).convolve(x, kernel, stride, padding)

        return str(jax.make_jaxpr(convolve)(*arrays))

    assert ("conv_general_dilated" not in program("cpu")) == product
    assert "conv_general_dilated" in program("tpu")


# --- activations ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, in_torch",
    [("gelu", "gelu"), ("relu", "relu"), ("silu", "silu"), ("tanh", "tanh")],
)
def test_activations_equal_pytorch(rng, name, in_torch):
    torch = pytest.importorskip("torch")
    x = 3 * rng.normal(size=1000).astype(np.float32)
    theirs = getattr(torch.nn.functional, in_torch)(torch.tensor(x)).numpy()
    ours = activations.ACTIVATIONS[name](x)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    if name == "gelu":
        assert np.abs(activations.ACTIVATIONS["gelu_new"](x) - theirs).max() > 1e-4
        assert np.abs(activations.quick_gelu(x) - theirs).max() > 1e-3
        assert "erfc" not in str(jax.make_jaxpr(activations.gelu)(x))
