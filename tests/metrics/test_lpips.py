# SPDX-License-Identifier: Apache-2.0
"""LPIPS against PyTorch, written from the paper, and against its package if it is here.

The package cannot be a test dependency: it wants a torchvision, which does not go with
every torch. Where it is installed, its own code and learned weights are run on random
AlexNet weights, torchvision or not.
"""

import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from gift_jax.metrics import backbone, base, judge_lpips, lpips, towers
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


@pytest.mark.parametrize("size", [(64, 64), (96, 80)])
def test_lpips_equals_pytorch(arrays, folder, pictures, size):
    generated, references = (np.stack([resized(x, size) for x in a]) for a in pictures)
    assert np.abs(generated[:2].astype(int) - references).max() > 50
    ours = lpips.pairwise(lpips.load(str(folder)), generated, references)
    x, y = (
        np.stack([resized(image, (64, 64)) for image in images]) / 127.5 - 1
        for images in (generated, references)
    )
    expected = matrix_in_torch(arrays, x, y)
    assert expected.min() > 0.05 and np.ptp(expected) > 0.005
    np.testing.assert_allclose(ours, expected, rtol=5e-6)


def resized(image, size):
    return np.asarray(Image.fromarray(image).resize(size, Image.BILINEAR))


def test_imma_protocol_has_its_range(arrays, folder, pictures):
    generated, references = pictures
    standard = lpips.load(str(folder / lpips.FILE))
    imma = lpips.load(str(folder / lpips.FILE), "imma-64px")
    ours = lpips.pairwise(imma, generated, references)
    usual = lpips.pairwise(standard, generated, references)
    assert np.abs(ours / usual - 1).min() > 0.01
    expected = matrix_in_torch(arrays, generated / 255, references / 255)
    np.testing.assert_allclose(ours, expected, rtol=5e-6)


def test_lpips_equals_its_package(monkeypatch, tmp_path, pictures):
    """With the package's learned weights, through the file that `EXPORT` writes."""
    torch = pytest.importorskip("torch")
    stub = types.ModuleType("torchvision")
    stub.models = types.ModuleType("torchvision.models")
    stub.models.alexnet = random_alexnet
    monkeypatch.setitem(sys.modules, "torchvision", stub)
    monkeypatch.setitem(sys.modules, "torchvision.models", stub.models)
    package = pytest.importorskip("lpips")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(lpips.EXPORT, {})
    torch.manual_seed(0)
    theirs = package.LPIPS(net="alex", verbose=False)
    generated, references = pictures
    ours = lpips.pairwise(lpips.load(str(tmp_path)), generated, references)

    def tensor(image):
        return torch.tensor(image[None] / 127.5 - 1).float().permute(0, 3, 1, 2)

    with torch.no_grad():
        rows = [
            [theirs(tensor(a), tensor(b)).item() for b in references] for a in generated
        ]
    assert np.ptp(rows) > 1e-3
    np.testing.assert_allclose(ours, rows, rtol=2e-5)


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
def stages_of():
    stages, _ = towers.judge_stages(backbone.JUDGE)
    return lambda images: stages(jnp.asarray(images / 127.5 - 1, jnp.float32))


def test_judge_stages_are_what_the_judge_computes(stages_of, pictures):
    images = pictures[0][:2]
    stages = stages_of(images)
    sizes = [(32, 32, 32), (16, 16, 64), (8, 8, 128), (4, 4, 256)]
    assert [h.shape[1:] for h in stages] == sizes
    file = backbone.JUDGE / "model.safetensors"
    arrays = safetensors.numpy.load_file(file)
    scale, bias, project = (
        arrays[name].astype(np.float64)
        for name in (
            *("vision_model.norm.weight", "vision_model.norm.bias"),
            "visual_projection.weight",
        )
    )
    # what the tower still does after its last stage: group norm, SiLU, projection
    h_BHWC = np.asarray(stages[-1], np.float64)
    grouped = h_BHWC.reshape(2, 16, 8, -1)
    mean = grouped.mean(axis=(1, 3), keepdims=True)
    variance = grouped.var(axis=(1, 3), keepdims=True)
    h_BHWC = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(h_BHWC.shape)
    h_BHWC = h_BHWC * scale + bias
    h_BHWC = h_BHWC / (1 + np.exp(-h_BHWC))
    ours = h_BHWC.reshape(2, -1) @ project.T
    expected = backbone.load("judge").features(images)
    assert np.abs(expected[0] - expected[1]).max() > 0.1
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_judge_lpips_is_the_unweighted_sum(stages_of, pictures):
    x_images, y_images = (x[:2] for x in pictures)
    ours = lpips.pairwise(judge_lpips.load(), x_images, y_images)
    expected = np.zeros((2, 2))
    both = zip(stages_of(x_images), stages_of(y_images), strict=True)
    for x_NHWC, y_MHWC in both:
        x, y = (np.asarray(h, np.float64) for h in (x_NHWC, y_MHWC))
        x, y = (h / np.linalg.norm(h, axis=-1, keepdims=True) for h in (x, y))
        for i, j in np.ndindex(2, 2):
            expected[i, j] += np.mean(np.sum((x[i] - y[j]) ** 2, axis=-1))
    assert expected.min() > 0.05
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


# --- pairs ----------------------------------------------------------------------------


def test_pairs_do_not_depend_on_batches(pictures, monkeypatch):
    whole = lpips.pairwise(judge_lpips.load(), *pictures)
    monkeypatch.setattr(lpips, "BATCH", 2)
    parts = lpips.pairwise(judge_lpips.load(), *pictures)
    assert whole.shape == parts.shape == (3, 2)
    assert np.ptp(whole) > 0.01
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_mean_and_nearest_reveal_copies(pictures):
    generated, references = pictures
    training = np.concatenate([references, generated[1:2]])
    eval_set = base.EvalSet(
        generated, reference_images=references, training_images=training
    )
    mean, nearest = judge_lpips.METRIC.measure(eval_set, None, None)
    matrix_NM = lpips.pairwise(judge_lpips.load(), generated, references)
    np.testing.assert_allclose(mean.samples, matrix_NM.mean(axis=1), rtol=1e-6)
    assert mean.value == pytest.approx(matrix_NM.mean())
    assert (mean.name, nearest.name) == ("judge_lpips", "judge_lpips_nearest_train")
    assert nearest.samples[1] == 0 == nearest.provenance["least"]
    assert nearest.samples[[0, 2]].min() > 0.05
    assert nearest.value == pytest.approx(nearest.samples.mean())
    assert nearest.provenance["training"] == 3
    assert mean.provenance["version"] == backbone.load("judge").version


def test_distance_grows_with_change(folder, pictures, rng):
    image = pictures[0][:1].astype(np.float64)
    noise = rng.normal(size=image.shape)
    changed = np.clip([image[0] + a * noise[0] for a in (5, 15, 45)], 0, 255)
    for distance in (judge_lpips.load(), lpips.load(str(folder))):
        matrix_NM = lpips.pairwise(distance, changed.astype(np.uint8), pictures[0][:1])
        assert np.all(np.diff(matrix_NM[:, 0]) > 0)


# --- errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "nowhere.safetensors", "."])
def test_missing_file_is_named_with_the_way_to_it(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(base.UnavailableError, match=lpips.FILE) as caught:
        lpips.load(path)
    assert "python -c 'import re, lpips" in str(caught.value)


def test_file_must_be_lpips(arrays, tmp_path):
    file = tmp_path / lpips.FILE
    safetensors.numpy.save_file({k: arrays[k] for k in arrays if k[0] == "f"}, file)
    with pytest.raises(UserError, match="lin0.weight is missing"):
        lpips.load(str(file))
    wrong = arrays | {"lin2.weight": arrays["lin3.weight"]}
    safetensors.numpy.save_file(wrong, file)
    with pytest.raises(UserError, match=r"lin2.weight is \[1, 256, 1, 1\], must be"):
        lpips.load(str(file))
    safetensors.numpy.save_file(arrays | {"lin1.weight": -wrong["lin1.weight"]}, file)
    with pytest.raises(UserError, match="lin1.weight is negative"):
        lpips.load(str(file))


def test_no_images_are_refused(pictures):
    with pytest.raises(UserError, match="0 images and 2 references"):
        lpips.pairwise(judge_lpips.load(), pictures[0][:0], pictures[1])
