# SPDX-License-Identifier: Apache-2.0
"""ImageNet classifiers against PyTorch's models behind their reference processors."""

import functools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from gift_jax.metrics import classifier, suite
from gift_jax.metrics.base import EvalSet, UnavailableError
from gift_jax.metrics.classifier_accuracy import accuracy
from gift_jax.metrics.settings import Settings
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError

TOLERANCE = 1e-4  # of the largest logit
LABELS = (
    *("tench, Tinca tinca", "goldfish, Carassius auratus", "crane", "purse"),
    *("Cardigan, Cardigan Welsh corgi", "cardigan", "crane"),
)
MODELS = ("bottleneck", "basic", "vit")
load = functools.cache(classifier.load)  # compiled once for all that change nothing


def pictures(height, width, count=5):
    """Smooth images "B H W 3" that have little in common."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, size=(count, 5, 7, 3), dtype=np.uint8)
    size = (width, height)
    return np.stack([np.asarray(Image.fromarray(x).resize(size)) for x in coarse])


def prepared(folder, images):
    """What the reference processor of a folder makes of images."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    return processor(list(images), return_tensors="np").pixel_values


def logits(model, x):
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(x)).logits.numpy()


def build(kind):
    """Returns (a PyTorch model with random weights, its processor)."""
    import transformers as t

    naming = {"id2label": dict(enumerate(LABELS))}
    if kind == "vit":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = t.ViTConfig(
            **sizes, intermediate_size=64, image_size=32, patch_size=8, **naming
        )
        processor = t.ViTImageProcessor(size={"height": 32, "width": 32})
        return t.ViTForImageClassification(config), processor
    config = t.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[16, 32],
        depths=[2, 2],
        layer_type=kind,
        downsample_in_first_stage=kind == "basic",
        **naming,
    )
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    processor = t.ConvNextImageProcessor(
        size={"shortest_edge": 40}, crop_pct=0.9, image_mean=mean, image_std=std
    )
    return t.ResNetForImageClassification(config), processor


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{kind: (PyTorch model, its folder)}; which give images different labels."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)

    def noise(x):
        return torch.randn(x.shape, generator=generator)

    models = {}
    for kind in MODELS:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, processor = build(kind)
        folder = tmp_path_factory.mktemp(kind)
        processor.save_pretrained(folder)
        with torch.no_grad():
            for x in model.parameters():
                x += 0.3 * noise(x) if x.ndim == 1 else 0.1 * noise(x)
            for name, x in model.named_buffers():
                if name.endswith("running_mean"):
                    x.copy_(0.5 * noise(x))
                if name.endswith("running_var"):
                    x.copy_(torch.exp(noise(x)))
            *_, (_, bias) = model.eval().named_parameters()
            model.save_pretrained(folder)
            mean = logits(model, prepared(folder, pictures(50, 71))).mean(axis=0)
            bias -= torch.as_tensor(mean)  # or all get one label
        model.save_pretrained(folder)
        models[kind] = model, folder
    return models


@pytest.fixture
def resnet(models):
    return models["bottleneck"]


def assert_spread(x_BN):
    """The pictures' logits differ by far more than the tolerance."""
    distance = np.abs(x_BN[:, None] - x_BN[None, :]).max(axis=-1)
    least = distance[~np.eye(len(x_BN), dtype=bool)].min()
    assert least > 100 * TOLERANCE * np.abs(x_BN).max()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shape", [(50, 71), (30, 30)])
def test_logits_equal_pytorch_behind_the_reference_processor(models, kind, shape):
    model, folder = models[kind]
    images = pictures(*shape)
    expected = logits(model, prepared(folder, images))
    assert_spread(expected)
    best = np.argmax(expected, axis=1)
    assert len(set(best)) > 1
    model = load(str(folder))
    ours = model.scores(images)
    assert ours.shape == (len(images), len(LABELS)) and ours.dtype == np.float32
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    assert error < TOLERANCE
    assert model.name(images) == [LABELS[i] for i in best]
    assert model.provenance["backbone"] == folder.name
    assert model.provenance["resolution"] == (32 if kind == "vit" else 40)
    assert len(model.provenance["version"]) == 12


@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
def test_each_running_statistic_is_used(models, tmp_path, statistic):
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(models["basic"][1], tmp_path / "copy")
    file = folder / "model.safetensors"
    images = pictures(50, 71, 1)
    before = load(str(models["basic"][1])).scores(images)
    tensors = load_file(file)
    changed = {
        name: value + 10 * torch.ones_like(value)
        for name, value in tensors.items()
        if name.endswith(statistic)
    }
    save_file(tensors | changed, file)
    model, _ = build("basic")
    model.load_state_dict(tensors | changed)
    expected = logits(model.eval(), prepared(folder, images))
    assert np.abs(expected - before).max() > 100 * TOLERANCE * np.abs(expected).max()
    ours = classifier.load(str(folder)).scores(images)
    assert np.abs(ours - expected).max() / np.abs(expected).max() < TOLERANCE


# --- names and labels -----------------------------------------------------------------


def saying(*labels):
    """A classifier that gives images these labels, by index, in turn."""
    score_BN = np.eye(len(LABELS), dtype=np.float32)[list(labels)]
    return classifier.Classifier(LABELS, lambda images: score_BN, {"backbone": "fake"})


@pytest.mark.parametrize(
    "name, labels",
    [
        ("tench", {0}),
        ("tinca  TINCA ", {0}),
        ("tench, Tinca tinca", {0}),
        ("crane", {2, 6}),
        ("Cardigan Welsh corgi", {4}),
        ("Cardigan", {5}),
    ],
)
def test_a_name_means_the_labels_that_go_by_it(name, labels):
    every = range(len(LABELS))
    images = np.zeros((len(LABELS), 4, 4, 3), np.uint8)
    result = accuracy(saying(*every), images, [{name}] * len(LABELS))
    assert {i for i in every if result.samples[i]} == labels
    assert result.value == pytest.approx(len(labels) / len(LABELS))


def test_any_accepted_name_of_an_image_will_do():
    images = np.zeros((3, 4, 4, 3), np.uint8)
    names = [{"purse", "goldfish"}, {"purse"}, {"Carassius auratus", "tench"}]
    result = accuracy(saying(3, 0, 1), images, names)
    np.testing.assert_array_equal(result.samples, [1, 0, 1])
    with pytest.raises(UserError, match="3 images, but 2 sets of names"):
        accuracy(saying(3, 0, 1), images, names[:2])


@pytest.mark.parametrize("name, close", [("tenhc", "tench"), ("Gold Fish", "goldfish")])
def test_a_name_that_is_no_label_suggests_one(name, close):
    images = np.zeros((1, 4, 4, 3), np.uint8)
    message = f"label='{name.casefold()}' is not one of: tench.*mean '{close}'"
    with pytest.raises(UserError, match=message):
        accuracy(saying(0), images, [{"tench", name}])


# --- in the suite ---------------------------------------------------------------------


def suite_of(folder):
    cfg = config.to_config(Settings)
    cfg.update(names=("classifier_accuracy", "sharpness"), classifier=str(folder))
    return suite.MetricSuite(config.resolve(cfg, Settings, "config.metrics"))


def test_suite_measures_concepts_and_skips_styles(resnet):
    model, folder = resnet
    images = pictures(64, 64)
    best = logits(model, prepared(folder, images)).argmax(axis=1)
    names = [LABELS[i] for i in best]
    assert len(set(names)) > 1
    metrics = suite_of(folder)
    labels = [{names[0].upper()}] * len(images)
    eval_set = EvalSet(images, accepted_labels=labels)
    metrics.check(eval_set)
    result, _ = metrics.measure(eval_set)
    assert result.samples.tolist() == [float(name == names[0]) for name in names]
    assert result.provenance == load(str(folder)).provenance and not metrics.skipped
    styles = eval_set.replace(accepted_labels=[{"noto"}] * 5, label_kind="style")
    metrics.check(styles)
    assert [result.name for result in metrics.measure(styles)] == ["sharpness"]
    assert "no labels of a style" in metrics.skipped["classifier_accuracy"]


def test_names_are_checked_before_weights_are_loaded(resnet, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier.towers, "classifier", pytest.fail)
    with pytest.raises(UserError, match="label='no such thing' is not one of"):
        classifier.check_labels(str(resnet[1]), "concept", {"no such thing"})
    classifier.check_labels(str(tmp_path / "none"), "concept", {"no such thing"})


def test_a_classifier_that_is_not_here_is_skipped(tmp_path):
    metrics = suite_of(tmp_path / "none")
    eval_set = EvalSet(pictures(64, 64), accepted_labels=[{"purse"}] * 5)
    assert [result.name for result in metrics.measure(eval_set)] == ["sharpness"]
    assert "put config.json, preproc" in metrics.skipped["classifier_accuracy"]


# --- what a user may get wrong --------------------------------------------------------


def copied(folder, out, file, **changed):
    """A copy of a folder, with fields of a JSON file changed."""
    path = shutil.copytree(folder, out) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return str(out)


PROCESSOR = "preprocessor_config.json"


@pytest.mark.parametrize(
    "kind, file, fields, message",
    [
        ("vit", "config.json", {"architectures": ["ViTModel"]}, "one of ResNetForImag"),
        ("vit", "config.json", {"id2label": {"1": "a", "2": "b"}}, "id2label must"),
        ("vit", "config.json", {"id2label": {"0": "a"}}, "but config.json says"),
        ("vit", PROCESSOR, {"size": {"height": 48, "width": 48}}, "makes 48 pixels"),
        ("vit", PROCESSOR, {"size": {"height": 32, "width": 40}}, "must be of a squa"),
        ("bottleneck", "config.json", {"layer_type": "wide"}, "layer_type='wide' is"),
        (
            "bottleneck",
            PROCESSOR,
            {"image_processor_type": "BitImageProcessor"},
            "image_processor_type='BitImageProcessor' is not supported",
        ),
        ("bottleneck", PROCESSOR, {"crop_pct": 1.5}, r"crop_pct=1.5 .* in \(0, 1\]"),
        ("bottleneck", PROCESSOR, {"resample": 9}, "resample=9 must be one of PIL's"),
        ("bottleneck", PROCESSOR, {"do_rescale": False}, "do_rescale=false is not"),
    ],
)
def test_an_unsupported_setting_is_named(models, tmp_path, kind, file, fields, message):
    spec = copied(models[kind][1], tmp_path / "copy", file, **fields)
    with pytest.raises(UserError, match=message) as caught:
        classifier.load(spec)
    assert not isinstance(caught.value, UnavailableError)
    assert "\n" not in str(caught.value)
