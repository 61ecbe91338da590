# SPDX-License-Identifier: Apache-2.0
"""The UNet, VAE and text encoder: as PyTorch computes them, and what they offer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_model import relative_error

from gift_jax.models import exports, sd, weights
from gift_jax.models.ops import attention
from gift_jax.models.ops.kernels import Kernels
from gift_jax.models.params import parameter_shapes
from gift_jax.models.sd import architectures, layers, stable_diffusion

TOLERANCE = 1e-5
slow = pytest.mark.slow


def unet_inputs(rng, batch=2):
    z = rng.normal(size=(batch, 4, 8, 8)).astype(np.float32)
    t = np.asarray([3, 987][:batch], np.int32)
    c = rng.normal(size=(batch, 16, 32)).astype(np.float32)
    return z, t, c


# --- PyTorch's numbers ----------------------------------------------------------------


def test_unet_equals_pytorch(tiny, tiny_folder, rng):
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DConditionModel

    z, t, c = unet_inputs(rng)
    theirs = UNet2DConditionModel.from_pretrained(str(tiny_folder / "unet"))
    with torch.no_grad():
        expected = theirs(torch.tensor(z), torch.tensor(t), torch.tensor(c)).sample
    params = tiny.params["unet"]
    ours, _ = jax.jit(lambda p: sd.apply_unet(tiny.unet, p, z, t, c))(params)
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
    mean, logvar = jax.jit(lambda p: sd.apply_vae_encode(tiny.vae, p, x))(params)
    z = posterior.mean.numpy()
    decoded = jax.jit(lambda p: sd.apply_vae_decode(tiny.vae, p, z))(params)
    assert relative_error(mean, posterior.mean.numpy()) < TOLERANCE
    assert relative_error(logvar, posterior.logvar.numpy()) < TOLERANCE
    assert relative_error(decoded, image.numpy()) < TOLERANCE


@pytest.mark.parametrize("eos", [513, 2])
def test_text_equals_pytorch(tiny, tmp_path, tiny_folder, rng, eos):
    torch = pytest.importorskip("torch")
    from transformers import CLIPTextModel

    _, params, config = weights.load_component(
        tiny_folder / "text_encoder", "text_encoder"
    )
    config = config | {"eos_token_id": eos}
    exports.save_model_folder(tmp_path / "text", config, params)
    ids = rng.integers(3, 512, size=(3, 16)).astype(np.int32)
    ids[:, 0], ids[0, 5:], ids[1, 9:], ids[2, 15:] = 512, 513, 513, 513
    theirs = CLIPTextModel.from_pretrained(str(tmp_path / "text"))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids, dtype=torch.long))
    hidden, pooled, _ = sd.apply_text(sd.build_text(config), params, ids)
    assert relative_error(hidden, expected.last_hidden_state.numpy()) < TOLERANCE
    assert relative_error(pooled, expected.pooler_output.numpy()) < TOLERANCE
    ends = [5, 9, 15]
    assert np.array_equal(pooled, hidden[np.arange(3), ends])


# --- parameters -----------------------------------------------------------------------


@pytest.mark.parametrize("name, text", [("sd15", 196), ("sd21", 372)])
def test_parameters_are_those_of_the_published_models(name, text):
    configs = architectures.MODELS[name]
    modules = {
        "unet": sd.build_unet(configs["unet"]),
        "vae": sd.build_vae(configs["vae"]),
        "text_encoder": sd.build_text(configs["text_encoder"]),
    }
    flat = {
        kind: flatten_dict(parameter_shapes(module), sep="/")
        for kind, module in modules.items()
    }
    counts = {kind: len(leaves) for kind, leaves in flat.items()}
    assert counts == {"unet": 686, "vae": 248, "text_encoder": text}
    sizes = {kind: sum(a.size for a in flat[kind].values()) for kind in flat}
    expected = {
        "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
        "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    }
    assert sizes == expected[name]
    project = flat["unet"]["mid_block/attentions_0/proj_in/kernel"].shape
    assert project == ((1280, 1280) if name == "sd21" else (1, 1, 1280, 1280))


def test_depth_may_differ_by_stage(rng):
    config = dict(architectures.MODELS["sd15"]["unet"])
    config |= {"block_out_channels": [32, 64], "transformer_layers_per_block": [1, 3]}
    config |= {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}
    config |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}
    flat = flatten_dict(parameter_shapes(sd.build_unet(config)), sep="/")
    blocks = {path.split("/attn1")[0] for path in flat if "/attn1/" in path}
    assert len(blocks) == 3 * (2 + 1 + 3)  # down, mid, up
    assert all("blocks_0" in block or "mid" in block for block in blocks) is False


# --- hidden states --------------------------------------------------------------------


@pytest.mark.parametrize("remat", ["none", "block", "full"])
def test_capture_returns_the_layers_of_a_kind(tiny, rng, remat):
    z, t, c = unet_inputs(rng)
    unet = tiny.unet.clone(kernels=Kernels(remat=remat))

    def hiddens(*kinds):
        def apply(p):
            return sd.apply_unet(unet, p, z, t, c, capture=kinds)

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
    assert set(shapes) < set(both) and len(both) == 4 + 8
    assert both["mid_block/resnets_1"].shape == (2, 4, 4, 64)
    heads = hiddens("attention")
    assert len(heads) == 8
    assert "mid_block/attentions_0/transformer_blocks_0/attn2" in heads


def test_capture_is_differentiable_and_leaks_nothing(tiny, rng):
    z, t, c = unet_inputs(rng)
    name = "mid_block/attentions_0/transformer_blocks_0"

    @jax.jit
    def loss(p):
        _, h = sd.apply_unet(tiny.unet, p, z, t, c, capture=("transformer",))
        return jnp.mean(h[name] ** 2)

    with jax.checking_leaks():
        grads = jax.jit(jax.grad(loss))(tiny.params["unet"])
    assert np.abs(grads["mid_block"]["resnets_0"]["conv1"]["kernel"]).max() > 0
    assert np.abs(grads["mid_block"]["resnets_1"]["conv1"]["kernel"]).max() == 0


def test_unknown_kinds_are_refused(tiny, rng):
    z, t, c = unet_inputs(rng)
    with pytest.raises(ValueError, match="capture='norm' must be one of transformer"):
        sd.apply_unet(tiny.unet, tiny.params["unet"], z, t, c, capture=("norm",))


# --- other ways to the same numbers ---------------------------------------------------


def loss_of(model, inputs, kernels: Kernels):
    unet = model.unet.clone(kernels=kernels)

    def loss(params):
        out, hiddens = sd.apply_unet(unet, params, *inputs, ("transformer", "resnet"))
        noised = sum(jnp.mean(h.astype(jnp.float32) ** 2) for h in hiddens.values())
        return jnp.mean(out.astype(jnp.float32) ** 2) + 0.1 * noised

    return loss


def assert_close(ours, theirs):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max() + 1e-7)


def residuals(loss, params):
    """Returns the number of floats kept for the backward pass, parameters not."""
    _, backward = jax.eval_shape(lambda p: jax.vjp(loss, p), params)
    shapes = [a.shape for a in jax.tree.leaves(params)]
    kept = [a for a in jax.tree.leaves(backward) if a.shape not in shapes]
    return sum(a.size for a in kept)


@slow
@pytest.mark.parametrize("remat", ["block", "full"])
def test_what_is_computed_again_is_the_same(tiny, rng, remat):
    inputs, params = unet_inputs(rng), tiny.params["unet"]
    plain, again = (loss_of(tiny, inputs, Kernels(remat=r)) for r in ("none", remat))
    assert residuals(again, params) < 0.3 * residuals(plain, params)
    value, grads = jax.jit(jax.value_and_grad(plain))(params)
    other_value, other_grads = jax.jit(jax.value_and_grad(again))(params)
    np.testing.assert_allclose(other_value, value, rtol=1e-6)
    assert_close(other_grads, grads)


@slow
def test_layers_in_parts_are_the_same(tiny, rng, monkeypatch):
    inputs, params = unet_inputs(rng), tiny.params["unet"]

    def remats(remat):
        loss = loss_of(tiny, inputs, Kernels(remat=remat))
        return loss, str(jax.make_jaxpr(jax.grad(loss))(params)).count("remat")

    plain, none = remats("none")
    _, block = remats("block")
    monkeypatch.setattr(layers, "_PART", 16)  # of 64 positions
    in_parts, most = remats("block")
    assert most > block > none == remats("none")[1] == 0
    value, grads = jax.jit(jax.value_and_grad(plain))(params)
    other_value, other_grads = jax.jit(jax.value_and_grad(in_parts))(params)
    np.testing.assert_allclose(other_value, value, rtol=1e-6)
    assert_close(other_grads, grads)


def test_tokens_by_parts_are_computed_again_and_the_same(rng, monkeypatch):
    """Of large images the widest layers take some tokens at a time, if remat is on."""
    x, c = (rng.normal(size=(2, n, 32)).astype(np.float32) for n in (64, 16))
    params = layers.TransformerBlock(2).init(jax.random.key(0), x, c)["params"]

    def run(remat):
        block = layers.TransformerBlock(2, kernels=Kernels(remat=remat))

        def loss(params):
            return jnp.mean(block.apply({"params": params}, x, c) ** 2)

        program = str(jax.make_jaxpr(jax.grad(loss))(params))
        return program.count("remat"), jax.jit(jax.value_and_grad(loss))(params)

    whole, (value, grads) = run("block")
    monkeypatch.setattr(layers, "_PART", 16)  # of 64 positions
    parts, (other_value, other_grads) = run("block")
    assert parts > whole == run("none")[0] == 0
    np.testing.assert_allclose(other_value, value, rtol=1e-6)
    assert_close(other_grads, grads)


@slow
def test_tokens_by_parts_have_the_same_hidden_states(tiny, rng, monkeypatch):
    *inputs, c = unet_inputs(rng)
    unet, params = tiny.unet.clone(kernels=Kernels(remat="block")), tiny.params["unet"]
    text = sd.project_text(tiny.unet, params, c)

    @jax.jit
    def run(params, text):
        kinds = ("transformer", "resnet", "attention")
        projected, _ = sd.apply_unet(unet, params, *inputs, c, text=text)
        return projected, *sd.apply_unet(unet, params, *inputs, c, kinds)

    _, out, hiddens = run(params, text)
    run.clear_cache()
    monkeypatch.setattr(layers, "_PART", 16)
    projected, other, others = run(params, text)
    assert relative_error(projected, out) < 1e-5
    assert relative_error(other, out) < 1e-5
    assert hiddens.keys() == others.keys() and len(hiddens) > 12
    for name, hidden in hiddens.items():
        assert relative_error(others[name], hidden) < 1e-5


def test_the_references_give_the_same_gradients(tiny, rng, monkeypatch):
    monkeypatch.setattr(attention, "_WHOLE_SCORES_BYTES", 2000)
    inputs, params = unet_inputs(rng), tiny.params["unet"]
    fast = loss_of(tiny, inputs, Kernels("chunked", "matmul", "matmul"))
    plain = loss_of(tiny, inputs, Kernels("plain", "xla", "xla"))
    programs = [str(jax.make_jaxpr(loss)(params)) for loss in (fast, plain)]
    assert ["scan" in p for p in programs] == [True, False]
    assert ["conv_general_dilated" in p for p in programs] == [False, True]
    ours, theirs = (jax.jit(jax.value_and_grad(loss))(params) for loss in (fast, plain))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    assert_close(ours[1], theirs[1])


@slow
def test_the_unet_in_bfloat16_is_as_exact(tiny_folder, tiny, rng, monkeypatch):
    half = stable_diffusion.load(tiny_folder, jnp.bfloat16)
    inputs = unet_inputs(rng)
    monkeypatch.setattr(attention, "_WHOLE_SCORES_BYTES", 2000)
    outs = {}
    for name, kernels in {
        "plain": Kernels("plain", "xla"),
        "chunked": Kernels("chunked", "xla"),
        "matmul": Kernels("plain", "matmul"),
    }.items():
        unet = half.unet.clone(kernels=kernels)
        apply = jax.jit(functools.partial(sd.apply_unet, unet))
        outs[name] = apply(half.params["unet"], *inputs)[0]
        assert outs[name].dtype == jnp.bfloat16
    apply = jax.jit(functools.partial(sd.apply_unet, tiny.unet))
    exact, _ = apply(tiny.params["unet"], *inputs)
    exact = np.asarray(exact, np.float64)
    errors = {
        name: np.linalg.norm(np.asarray(out, np.float64) - exact)
        for name, out in outs.items()
    }
    assert 1e-3 < errors["plain"] / np.linalg.norm(exact) < 3e-2  # of a random network
    assert errors["chunked"] < 1.1 * errors["plain"]
    assert errors["matmul"] < 1.1 * errors["plain"]


@pytest.mark.parametrize("remat", ["none", "block"])
def test_text_is_projected_once(tiny, rng, remat):
    z, t, c = unet_inputs(rng)
    params = tiny.params["unet"]
    unet = tiny.unet.clone(kernels=Kernels(remat=remat))
    text = jax.jit(functools.partial(sd.project_text, unet))(params, c)
    assert len(jax.tree.leaves(text)) == 2 * 4  # keys and values of each transformer
    plain = jax.jit(lambda c: sd.apply_unet(unet, params, z, t, c)[0])
    projected = jax.jit(lambda c: sd.apply_unet(unet, params, z, t, c, text=text)[0])
    out, ours = plain(c), projected(c)
    assert relative_error(ours, out) < 1e-6
    np.testing.assert_array_equal(ours, projected(0 * c))
    assert relative_error(plain(0 * c), out) > 0.1
