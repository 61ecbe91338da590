# SPDX-License-Identifier: Apache-2.0
"""LPIPS against PyTorch, written from the paper, and against its package if it is here.

The package cannot be a test dependency: it wants a torchvision, which does not go with
every torch. Where it is installed, its own code and learned weights are run on random
AlexNet weights, torchvision or not.
"""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from gift_jax.metrics import judge, lpips
from gift_jax.metrics.base import MissingWeights
from gift_jax.models import vision, weights
from gift_jax.models.ops.layers import GroupNorm
from gift_jax.runtime.errors import UserError

# AlexNet as torchvision's `features`: index: (out, in, kernel, stride, padding)
ALEXNET = {
    0: (64, 3, 11, 4, 2),
    3: (192, 64, 5, 1, 2),
    6: (384, 192, 3, 1, 1),
    8: (256, 384, 3, 1, 1),
    10: (256, 256, 3, 1, 1),
}


@pytest.fixture(scope="module")
def arrays():
    """Random weights, in PyTorch's names and layouts."""
    rng, found = np.random.default_rng(1), {}
    for stage, (layer, (out, into, side, _, _)) in enumerate(ALEXNET.items()):
        spread = (2 / (into * side**2)) ** 0.5
        kernel = rng.normal(0, spread, (out, into, side, side))
        found[f"features.{layer}.weight"] = kernel
        found[f"features.{layer}.bias"] = rng.normal(0, 0.1, out)
        found[f"lin{stage}.weight"] = rng.exponential(0.2, (1, out, 1, 1))
    return {name: array.astype(np.float32) for name, array in found.items()}


@pytest.fixture(scope="module")
def folder(arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    safetensors.numpy.save_file(arrays, folder / lpips.FILE)
    return folder


@pytest.fixture
def pictures(rng):
    """Uint8 (3, 64, 64, 3) and (2, 64, 64, 3): smooth, and all different."""
    coarse = rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    size = (64, 64)
    big = [Image.fromarray(c).resize(size, Image.Resampling.BICUBIC) for c in coarse]
    images = np.stack([np.asarray(image) for image in big])
    return images[:3], images[3:]


def matrix_in_torch(arrays, x_NHWC, y_MHWC):
    """LPIPS of all pairs, "N M", in float64, by PyTorch's own layers."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional

    def tensor(a):
        return torch.tensor(np.asarray(a, np.float64))

    shift, scale = tensor([-0.030, -0.088, -0.188]), tensor([0.458, 0.448, 0.450])

    def stages(x_BHWC):
        h = ((tensor(x_BHWC) - shift) / scale).permute(0, 3, 1, 2)
        for layer, (*_, stride, padding) in ALEXNET.items():
            if layer in (3, 6):
                h = functional.max_pool2d(h, kernel_size=3, stride=2)
            weight = tensor(arrays[f"features.{layer}.weight"])
            bias = tensor(arrays[f"features.{layer}.bias"])
            h = functional.relu(functional.conv2d(h, weight, bias, stride, padding))
            yield h / (torch.sqrt((h**2).sum(dim=1, keepdim=True)) + 1e-10)

    total = 0
    for i, (a, b) in enumerate(zip(stages(x_NHWC), stages(y_MHWC), strict=True)):
        weighted = tensor(arrays[f"lin{i}.weight"]) * (a[:, None] - b) ** 2
        total = total + weighted.sum(dim=2).mean(dim=(2, 3))
    return total.numpy()


@pytest.mark.parametrize("resolution", [64, 97])
def test_lpips_equals_pytorch(arrays, folder, pictures, resolution):
    generated, references = pictures
    found = lpips.pairs(
        lpips.load(folder, resolution=resolution), generated, references
    )
    assert np.abs(generated[:2].astype(int) - references).max() > 50
    size = (resolution, resolution)
    x, y = (
        np.stack([Image.fromarray(a).resize(size, Image.BILINEAR) for a in images])
        / 127.5
        - 1
        for images in pictures
    )
    wanted = matrix_in_torch(arrays, x, y)
    assert wanted.min() > 0.05 and np.ptp(wanted) > 0.005
    np.testing.assert_allclose(found.matrix_NM, wanted, rtol=5e-6)
    resize = "none" if resolution == 64 else "Pillow bilinear, antialiased, from 64x64"
    assert found.how["resize"] == resize
    assert found.how["resolution"] == resolution


def test_imma_protocol_has_its_range_and_size(arrays, folder, pictures):
    generated, references = pictures
    standard = lpips.load(folder / lpips.FILE)
    imma = lpips.load(folder / lpips.FILE, protocol="imma-64px")
    found = lpips.pairs(imma, generated, references)
    usual = lpips.pairs(standard, generated, references)
    assert np.abs(found.matrix_NM / usual.matrix_NM - 1).min() > 0.01
    wanted = matrix_in_torch(arrays, generated / 255, references / 255)
    np.testing.assert_allclose(found.matrix_NM, wanted, rtol=5e-6)
    assert found.how["protocol"] == "imma-64px"
    assert found.how["input_range"] == [0.0, 1.0]
    large = np.repeat(np.repeat(generated, 3, axis=1), 2, axis=2)
    assert lpips.pairs(imma, large, references).how["resize"].endswith("192x128")
    with pytest.raises(UserError, match="imma-64px has 64"):
        lpips.load(folder, protocol="imma-64px", resolution=128)


def test_lpips_equals_its_package(monkeypatch, tmp_path, pictures):
    """With the package's learned weights, through the file that `MAKE` writes."""
    torch = pytest.importorskip("torch")
    stub = types.ModuleType("torchvision")
    stub.models = types.ModuleType("torchvision.models")
    stub.models.alexnet = random_alexnet
    monkeypatch.setitem(sys.modules, "torchvision", stub)
    monkeypatch.setitem(sys.modules, "torchvision.models", stub.models)
    package = pytest.importorskip("lpips")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(lpips.MAKE, {})
    torch.manual_seed(0)
    theirs = package.LPIPS(net="alex", verbose=False)
    generated, references = pictures
    found = lpips.pairs(lpips.load(tmp_path), generated, references).matrix_NM

    def tensor(image):
        return torch.tensor(image[None] / 127.5 - 1).float().permute(0, 3, 1, 2)

    with torch.no_grad():
        rows = [
            [theirs(tensor(a), tensor(b)).item() for b in references] for a in generated
        ]
    assert np.ptp(rows) > 1e-3
    np.testing.assert_allclose(found, rows, rtol=2e-5)


def random_alexnet(**_):
    from torch import nn

    layers = []
    for layer, (out, into, side, stride, padding) in ALEXNET.items():
        if layer in (3, 6):
            layers.append(nn.MaxPool2d(3, 2))
        layers += [nn.Conv2d(into, out, side, stride, padding), nn.ReLU()]
    return types.SimpleNamespace(features=nn.Sequential(*layers))


# --- the judge's ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    clip, params, _ = weights.load_component(judge.FOLDER, "clip")
    run = jax.jit(lambda p, x: vision.apply_clip_stages(clip, p, x))
    return clip, params, lambda x: run(params, jnp.asarray(x / 127.5 - 1, jnp.float32))


def test_judge_stages_are_what_the_judge_computes(clip, pictures):
    module, params, stages_of = clip
    stages = stages_of(pictures[0][:2])
    sizes = [(32, 32, 32), (16, 16, 64), (8, 8, 128), (4, 4, 256)]
    assert [h.shape[1:] for h in stages] == sizes

    @jax.jit
    def read_out(params, h_BHWC):  # what the tower still does after its last stage
        norm = {"params": params["vision_model"]["norm"]}
        h_BHWC = GroupNorm(8, 1e-6).apply(norm, h_BHWC)
        flat = jax.nn.silu(h_BHWC).reshape(len(h_BHWC), -1)
        return flat @ params["visual_projection"]["kernel"]

    x_BCHW = np.transpose(pictures[0][:2] / 127.5 - 1, (0, 3, 1, 2)).astype(np.float32)
    judged = jax.jit(lambda p, x: vision.apply_clip_image(module, p, x))
    wanted = judged(params, x_BCHW)
    assert np.abs(wanted[0] - wanted[1]).max() > 0.1
    found = read_out(params, stages[-1])
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_judge_distance_is_the_unweighted_sum(clip, pictures):
    found = lpips.pairs(lpips.judge_distance(), *(x[:2] for x in pictures))
    x_stages, y_stages = (clip[2](x[:2]) for x in pictures)
    wanted = np.zeros((2, 2))
    for x_NHWC, y_MHWC in zip(x_stages, y_stages, strict=True):
        x, y = (np.asarray(h, np.float64) for h in (x_NHWC, y_MHWC))
        x, y = (h / np.linalg.norm(h, axis=-1, keepdims=True) for h in (x, y))
        for i, j in np.ndindex(2, 2):
            wanted[i, j] += np.mean(np.sum((x[i] - y[j]) ** 2, axis=-1))
    assert wanted.min() > 0.05
    np.testing.assert_allclose(found.matrix_NM, wanted, rtol=1e-5)
    value = found.mean()
    assert value.name == "judge_distance" and "not LPIPS" in value.how["note"]
    assert value.how["version"] == weights.content_hash(judge.FOLDER)[:12]


# --- pairs ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def offline():
    return lpips.judge_distance()


def test_pairs_do_not_depend_on_batches(offline, pictures, monkeypatch):
    generated, references = pictures
    whole = lpips.pairs(offline, generated, references).matrix_NM
    monkeypatch.setattr(lpips, "BATCH", 2)
    parts = lpips.pairs(offline, generated, references).matrix_NM
    assert whole.shape == parts.shape == (3, 2)
    assert np.ptp(whole) > 0.01
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_mean_and_nearest_tell_copies(offline, pictures):
    generated, references = pictures
    training = np.concatenate([references, generated[1:2]])
    found = lpips.pairs(offline, generated, training)
    mean, nearest = found.mean(), found.nearest()
    np.testing.assert_allclose(mean.samples, found.matrix_NM.mean(axis=1))
    assert mean.value == pytest.approx(found.matrix_NM.mean())
    assert nearest.name == "judge_distance_nearest"
    assert nearest.samples[1] == 0 == nearest.how["least"]
    assert nearest.samples[[0, 2]].min() > 0.05
    assert nearest.value == pytest.approx(nearest.samples.mean())
    assert mean.how["n_generated"] == 3 and mean.how["n_references"] == 3
    assert mean.as_json()["samples"][0] == pytest.approx(mean.samples[0], abs=1e-5)


def test_distance_grows_with_change(offline, folder, pictures, rng):
    image = pictures[0][:1].astype(np.float64)
    noise = rng.normal(size=image.shape)
    changed = np.clip([image[0] + a * noise[0] for a in (5, 15, 45)], 0, 255)
    for distance in (offline, lpips.load(folder)):
        found = lpips.pairs(distance, changed.astype(np.uint8), pictures[0][:1])
        assert np.all(np.diff(found.matrix_NM[:, 0]) > 0)


# --- errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", [None, "nowhere.safetensors", "."])
def test_missing_file_is_named_with_the_way_to_it(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingWeights, match=lpips.FILE) as caught:
        lpips.load(path)
    assert "python -c 'import re, lpips" in str(caught.value)


def test_file_must_be_lpips(arrays, tmp_path, pictures):
    file = tmp_path / lpips.FILE
    safetensors.numpy.save_file({k: arrays[k] for k in arrays if k[0] == "f"}, file)
    with pytest.raises(UserError, match="lin0.weight is missing"):
        lpips.load(file)
    wrong = arrays | {"lin2.weight": arrays["lin3.weight"]}
    safetensors.numpy.save_file(wrong, file)
    with pytest.raises(UserError, match=r"lin2.weight is \[1, 256, 1, 1\], must be"):
        lpips.load(file)
    safetensors.numpy.save_file(arrays | {"lin1.weight": -wrong["lin1.weight"]}, file)
    with pytest.raises(UserError, match="lin1.weight is negative"):
        lpips.load(file)


def test_wrong_arguments_are_refused(offline, folder, pictures):
    with pytest.raises(UserError, match="protocol='imma' must be one of standard"):
        lpips.load(folder, protocol="imma")
    with pytest.raises(UserError, match="resolution=16 must be 32 or more"):
        lpips.load(folder, resolution=16)
    with pytest.raises(UserError, match="0 pictures and 2 references"):
        lpips.pairs(offline, pictures[0][:0], pictures[1])
