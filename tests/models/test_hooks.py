# SPDX-License-Identifier: Apache-2.0
"""The Flax models against PyTorch's, and the layers that replace Flax's own."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import TINY_TEXT, random_params, relative_error

from gift_jax.models import hooks, weights
from gift_jax.models.kernels import Kernels

TOLERANCE = 1e-5


def unet_inputs(rng, batch=2):
    z = rng.normal(size=(batch, 4, 8, 8)).astype(np.float32)
    t = np.asarray([3, 987][:batch], np.int32)
    c = rng.normal(size=(batch, 16, 32)).astype(np.float32)
    return z, t, c


def test_unet_equals_pytorch(tiny, tiny_folder, rng):
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel

    z, t, c = unet_inputs(rng)
    theirs = UNet2DConditionModel.from_pretrained(str(tiny_folder / "unet"))
    with torch.no_grad():
        expected = theirs(torch.tensor(z), torch.tensor(t), torch.tensor(c)).sample
    params = tiny.params["unet"]
    ours, _ = jax.jit(lambda p: hooks.apply_unet(tiny.unet, p, z, t, c))(params)
    stock = tiny.unet.apply({"params": params}, z, jnp.asarray(t), c).sample
    assert (
        relative_error(stock, expected.numpy()) > TOLERANCE
    )  # or nothing is corrected
    assert relative_error(ours, expected.numpy()) < TOLERANCE


def test_vae_equals_pytorch(tiny, tiny_folder, rng):
    torch = pytest.importorskip("torch")
    from diffusers import AutoencoderKL

    x = rng.uniform(-1, 1, size=(2, 3, 16, 16)).astype(np.float32)
    theirs = AutoencoderKL.from_pretrained(str(tiny_folder / "vae"))
    with torch.no_grad():
        posterior = theirs.encode(torch.tensor(x)).latent_dist
        image = theirs.decode(posterior.mean).sample
    params = tiny.params["vae"]
    mean, logvar = jax.jit(lambda p: hooks.apply_vae_encode(tiny.vae, p, x))(params)
    z = posterior.mean.numpy()
    decoded = jax.jit(lambda p: hooks.apply_vae_decode(tiny.vae, p, z))(params)
    assert relative_error(mean, posterior.mean.numpy()) < TOLERANCE
    assert relative_error(logvar, posterior.logvar.numpy()) < TOLERANCE
    assert relative_error(decoded, image.numpy()) < TOLERANCE


def test_text_equals_pytorch(tiny, tiny_folder, rng):
    torch = pytest.importorskip("torch")
    from transformers import CLIPTextModel

    ids = rng.integers(0, 512, size=(3, 16)).astype(np.int32)
    ids[:, 0], ids[0, 5:], ids[1, 9:], ids[2, 15:] = 512, 513, 513, 513
    theirs = CLIPTextModel.from_pretrained(str(tiny_folder / "text_encoder"))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids, dtype=torch.long))
    hidden, pooled = hooks.apply_text(
        tiny.text_encoder, tiny.params["text_encoder"], ids
    )
    assert relative_error(hidden, expected.last_hidden_state.numpy()) < TOLERANCE
    assert relative_error(pooled, expected.pooler_output.numpy()) < TOLERANCE


def test_clip_equals_pytorch(tmp_path, rng):
    torch = pytest.importorskip("torch")
    from transformers import CLIPModel

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = {"text_config": TINY_TEXT, "vision_config": vision, "projection_dim": 24}
    clip = hooks.build_clip(config)
    params = random_params(clip, 0)
    weights.save_model_folder(tmp_path / "clip", config, params)
    theirs = CLIPModel.from_pretrained(str(tmp_path / "clip"))
    ids = rng.integers(0, 512, size=(2, 16)).astype(np.int32)
    ids[:, 7:] = 513
    x = rng.normal(size=(2, 3, 16, 16)).astype(np.float32)
    with torch.no_grad():
        text = theirs.get_text_features(torch.tensor(ids, dtype=torch.long))
        image = theirs.get_image_features(torch.tensor(x))
    ours = hooks.apply_clip_text(clip, params, ids)
    assert relative_error(ours, text.numpy()) < TOLERANCE
    for conv in ("matmul", "xla"):
        ours = hooks.apply_clip_image(clip, params, x, Kernels(conv=conv))
        assert relative_error(ours, image.numpy()) < TOLERANCE
    _, loaded, _ = weights.load_component(tmp_path / "clip", "clip")
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize(
    "kernel, stride, padding",
    [(3, 1, ((1, 1), (1, 1))), (3, 2, ((1, 1), (1, 1))), (3, 2, "VALID")]
    + [(1, 1, "VALID"), (4, 4, "VALID"), (3, 1, "SAME")],
)
def test_matmul_convolution_equals_xla(rng, kernel, stride, padding):
    conv = nn.Conv(6, (kernel, kernel), (stride, stride), padding)
    x = rng.normal(size=(2, 9, 11, 5)).astype(np.float32)
    params = conv.init(jax.random.key(0), x)

    def apply(params, x, how):
        with hooks.exact(Kernels(conv=how)):
            return conv.apply(params, x)

    def program(how):
        return str(jax.make_jaxpr(lambda p: apply(p, x, how))(params))

    assert "conv_general_dilated" in program("xla")
    assert ("conv_general_dilated" in program("matmul")) == (padding == "SAME")
    expected = apply(params, x, "xla")
    np.testing.assert_allclose(apply(params, x, "matmul"), expected, atol=3e-6)

    def loss(params, how):
        return jnp.sum(jnp.sin(apply(params, x, how)))

    ours, theirs = (jax.grad(loss)(params, how) for how in ("matmul", "xla"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 2e-6, 3e-5), ours, theirs
    )


def test_auto_convolution_is_a_product_for_few_positions():
    conv = nn.Conv(64, (3, 3), padding=((1, 1), (1, 1)))
    few, many = (jax.ShapeDtypeStruct((1, n, n, 64), np.float32) for n in (8, 16))
    params = jax.eval_shape(conv.init, jax.random.key(0), few)

    def program(x):
        with hooks.exact():
            return str(jax.make_jaxpr(conv.apply)(params, x))

    assert "conv_general_dilated" not in program(few)
    assert "conv_general_dilated" in program(many)


NORMS = {
    "layers": nn.LayerNorm(epsilon=1e-6),
    "layers, no bias": nn.LayerNorm(epsilon=1e-6, use_bias=False),
    "groups": nn.GroupNorm(8, epsilon=1e-5),
}


@pytest.mark.parametrize("shape", [(2, 6, 5, 24), (1, 30, 24), (3, 24)])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_norms_by_products_equal_xla(rng, norm, shape):
    x, towards = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    params = norm.init(jax.random.key(0), x)
    params = jax.tree.map(lambda p: p + rng.normal(size=p.shape), params)

    def results(how):
        def loss(params, x):
            with hooks.exact(Kernels(norm=how)):
                y = norm.apply(params, 3.0 + x)
            return jnp.sum(jnp.sin(y)), y

        def curvature(x):
            gradient = jax.grad(lambda x: loss(params, x)[0])
            return jax.jvp(gradient, (x,), (towards,))[1]

        grads, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return (y, grads, curvature(x)), str(jax.make_jaxpr(loss)(params, x))

    (ours, program), (theirs, xlas) = results("matmul"), results("xla")
    assert "dot_general" in program
    assert "dot_general" not in xlas
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_a_gated_layer_in_halves_equals_the_whole(rng):
    layer = hooks.attention_flax.FlaxGEGLU(16)
    x = rng.normal(size=(2, 12, 16)).astype(np.float32) * 3
    params = layer.init(jax.random.key(0), x)
    bias = rng.normal(size=(128,)).astype(np.float32)
    params["params"]["proj"]["bias"] = bias

    def result(platform):
        def loss(params, x):
            with hooks.exact(Kernels(platform=platform)):
                y = layer.apply(params, x)
            return jnp.sum(jnp.sin(y)), y

        value = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return value, str(jax.make_jaxpr(loss)(params, x))

    (ours, program), (theirs, whole) = result("cpu"), result("tpu")
    assert program.count("dot_general[") == 2 * whole.count("dot_general[")
    assert "erfc" in whole and "erfc" not in program
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize("how", ["xla", "matmul"])
def test_norms_keep_precision_far_from_zero(rng, how):
    x = (1000 + rng.normal(size=(2, 8, 8, 64))).astype(np.float32)
    mean = x.astype(np.float64).mean(-1, keepdims=True)
    expected = (x - mean) / np.sqrt(x.astype(np.float64).var(-1, keepdims=True) + 1e-6)
    norm = nn.LayerNorm(epsilon=1e-6)
    params = norm.init(jax.random.key(0), x)
    with hooks.exact(Kernels(norm=how)):
        ours = norm.apply(params, x)
    assert relative_error(norm.apply(params, x), expected) > 1e-3
    assert relative_error(ours, expected) < 1e-4


def test_capture_returns_the_layers_asked_for(tiny, rng):
    z, t, c = unet_inputs(rng)

    def hiddens(*kinds):
        def apply(p):
            return hooks.apply_unet(tiny.unet, p, z, t, c, capture=kinds)

        return jax.eval_shape(apply, tiny.params["unet"])[1]

    assert hiddens() == {}
    shapes = {name: h.shape for name, h in hiddens("transformer").items()}
    assert shapes == {
        "down_blocks_0/attentions_0/transformer_blocks_0": (2, 64, 32),
        "mid_block/attentions_0/transformer_blocks_0": (2, 16, 64),
        "up_blocks_1/attentions_0/transformer_blocks_0": (2, 64, 32),
        "up_blocks_1/attentions_1/transformer_blocks_0": (2, 64, 32),
    }
    both = hiddens("transformer", "resnet")
    assert set(shapes) < set(both)
    assert both["mid_block/resnets_1"].shape == (2, 4, 4, 64)


def test_capture_is_differentiable_and_leaks_nothing(tiny, rng):
    z, t, c = unet_inputs(rng)
    name = "mid_block/attentions_0/transformer_blocks_0"

    @jax.jit
    def loss(p):
        _, h = hooks.apply_unet(tiny.unet, p, z, t, c, capture=("transformer",))
        return jnp.mean(h[name] ** 2)

    with jax.checking_leaks():
        grads = jax.grad(loss)(tiny.params["unet"])
    assert np.abs(grads["mid_block"]["resnets_0"]["conv1"]["kernel"]).max() > 0
    assert np.abs(grads["mid_block"]["resnets_1"]["conv1"]["kernel"]).max() == 0


def test_exact_refuses_unknown_options():
    with pytest.raises(ValueError, match="capture='norm' must be one of transformer"):
        with hooks.exact(capture=("norm",)):
            pass


def test_only_the_deprecation_line_is_silenced(caplog):
    logger = logging.getLogger("diffusers.models.attention_flax")
    logger.addHandler(caplog.handler)  # whether they propagate depends on the version
    try:
        logger.warning("Flax classes are deprecated and will be removed in v0.40.0.")
        logger.warning("something else")
    finally:
        logger.removeHandler(caplog.handler)
    assert set(caplog.messages) == {"something else"}
