# SPDX-License-Identifier: Apache-2.0
"""ImageNet classifiers against PyTorch's models behind their reference processors."""

import functools
import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

import gift_jax
from gift_jax import evaluate, fields
from gift_jax.metrics import preprocessing, recognition, suite
from gift_jax.metrics.base import MissingWeights
from gift_jax.runtime.errors import UserError
from gift_jax.sampling import images

TOLERANCE = 1e-4  # of the largest logit
LABELS = (
    *("tench, Tinca tinca", "goldfish, Carassius auratus", "crane", "purse"),
    *("Cardigan, Cardigan Welsh corgi", "cardigan", "crane"),
)
MODELS = ("bottleneck", "basic", "vit")
load = functools.cache(recognition.load)  # compiled once for all that change nothing


def pictures(height, width, count=5):
    """Smooth pictures "B H W 3" that have little in common."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, size=(count, 5, 7, 3), dtype=np.uint8)
    size = (width, height)
    return np.stack([np.asarray(Image.fromarray(x).resize(size)) for x in coarse])


def prepared(folder, images):
    """What the reference processor of a folder makes of pictures."""
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
    """{kind: (PyTorch model, its folder)}; each names pictures apart."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)

    def noise(x):
        return torch.randn(x.shape, generator=generator)

    found = {}
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
            usual = logits(model, prepared(folder, pictures(50, 71))).mean(axis=0)
            bias -= torch.as_tensor(usual)  # or all are named alike
        model.save_pretrained(folder)
        found[kind] = model, folder
    return found


@pytest.fixture
def resnet(models):
    return models["bottleneck"]


def assert_spread(x_BN):
    """The pictures' logits differ by far more than the tolerance."""
    apart = np.abs(x_BN[:, None] - x_BN[None, :]).max(axis=-1)
    least = apart[~np.eye(len(x_BN), dtype=bool)].min()
    assert least > 100 * TOLERANCE * np.abs(x_BN).max()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shape", [(50, 71), (71, 50), (30, 30)])
def test_logits_equal_pytorch_behind_the_reference_processor(models, kind, shape):
    model, folder = models[kind]
    images = pictures(*shape)
    expected = logits(model, prepared(folder, images))
    assert_spread(expected)
    best = np.argmax(expected, axis=1)
    assert len(set(best)) > 1
    found = load(str(folder))
    ours = found.scores(images)
    assert ours.shape == (len(images), len(LABELS)) and ours.dtype == np.float32
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    assert error < TOLERANCE
    assert found.name(images) == [LABELS[i] for i in best]


@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
def test_each_running_statistic_is_used(models, tmp_path, kind, statistic):
    import torch
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(models[kind][1], tmp_path / "copy")
    file = folder / "model.safetensors"
    images = pictures(50, 71, 1)
    before = load(str(models[kind][1])).scores(images)
    held = load_file(file)
    names = [name for name in held if name.endswith(statistic)]
    changed = {name: held[name] + 10 * torch.ones_like(held[name]) for name in names}
    save_file(held | changed, file)
    model, _ = build(kind)
    model.load_state_dict(held | changed)
    expected = logits(model.eval(), prepared(folder, images))
    assert np.abs(expected - before).max() > 100 * TOLERANCE * np.abs(expected).max()
    ours = recognition.load(str(folder)).scores(images)
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    assert error < TOLERANCE


def test_how_says_what_made_it(models):
    for kind, side in (("bottleneck", 40), ("vit", 32)):
        folder = models[kind][1]
        how = dict(load(str(folder)).how)
        version = how.pop("version")
        assert len(version) == 12
        assert how == {
            "backbone": folder.name,
            "resolution": side,
            "trait": "thing",
            "labels": len(LABELS),
            "rule": "top-1",
        }


def test_version_is_of_the_content(resnet, tmp_path):
    folder = shutil.copytree(resnet[1], tmp_path / "copy")
    same = recognition.load(str(folder)).how["version"]
    assert same == load(str(resnet[1])).how["version"]
    rename(folder, "config.json", id2label=dict(enumerate(reversed(LABELS))))
    assert recognition.load(str(folder)).how["version"] != same


# --- preparing pictures ---------------------------------------------------------------


def square(side):
    return {"height": side, "width": side}


@pytest.mark.parametrize(
    "name, settings",
    [
        ("ViTImageProcessor", {"size": square(40)}),
        ("ViTImageProcessor", {"size": square(40), "resample": 3}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 40}}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 33}, "crop_pct": 0.95}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}, "resample": 3}),
        ("BitImageProcessor", {"size": {"shortest_edge": 44}, "crop_size": 40}),
    ],
)
@pytest.mark.parametrize("shape", [(50, 71), (71, 50), (20, 33)])
def test_pixels_equal_the_named_processor(tmp_path, name, settings, shape):
    pytest.importorskip("torch")
    import transformers

    getattr(transformers, name)(**settings).save_pretrained(tmp_path)
    images = np.random.default_rng(1).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    expected = prepared(tmp_path, images)
    others = {"ViT": "ConvNext"}.get(name[:3], "ViT")  # the file's own name counts
    ours = preprocessing.standard(
        images, preprocessing.read_reference(tmp_path, others)
    )
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize(
    "usual, named",
    [
        ("ViT", {}),
        ("ConvNext", {}),
        ("ViT", {"feature_extractor_type": "ConvNextFeatureExtractor"}),
        ("ConvNext", {"image_processor_type": "ViTImageProcessorFast"}),
    ],
)
def test_an_older_file_is_read_as_the_processor_would(tmp_path, usual, named):
    pytest.importorskip("torch")
    import transformers

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    written = {"size": 40, "resample": 3, "image_mean": mean, "image_std": std}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written | named))
    said = next(iter(named.values()), usual)
    kind = next(k for k in ("ViT", "ConvNext") if said.startswith(k))
    processor = getattr(transformers, f"{kind}ImageProcessor").from_pretrained(tmp_path)
    images = pictures(50, 71, 2)
    expected = processor(list(images), return_tensors="np").pixel_values
    ours = preprocessing.standard(images, preprocessing.read_reference(tmp_path, usual))
    np.testing.assert_allclose(ours, expected, atol=1e-6)


# --- names and labels -----------------------------------------------------------------


def says(*said):
    """Returns a classifier that says these labels, by index, of pictures in turn."""
    score_BN = np.eye(len(LABELS), dtype=np.float32)[list(said)]
    return recognition.Classifier(LABELS, lambda images: score_BN, {"backbone": "one"})


@pytest.mark.parametrize(
    "name, meant",
    [
        ("tench", {0}),
        ("Tinca tinca", {0}),
        ("tinca  TINCA ", {0}),
        ("tench, Tinca tinca", {0}),
        ("crane", {2, 6}),
        ("Cardigan Welsh corgi", {4}),
        ("cardigan", {5}),
        ("Cardigan", {5}),
        ("Cardigan, cardigan welsh corgi", {4}),
    ],
)
def test_a_name_means_the_labels_that_go_by_it(name, meant):
    every = range(len(LABELS))
    images = np.zeros((len(LABELS), 4, 4, 3), np.uint8)
    value = recognition.recognition(says(*every), images, [{name}] * len(LABELS))
    assert {i for i in every if value.samples[i]} == meant
    assert value.value == pytest.approx(len(meant) / len(LABELS))


def test_any_right_name_of_a_picture_will_do():
    images = np.zeros((3, 4, 4, 3), np.uint8)
    right = [{"purse", "goldfish"}, {"purse"}, {"Carassius auratus", "tench"}]
    value = recognition.recognition(says(3, 0, 1), images, right)
    np.testing.assert_array_equal(value.samples, [1, 0, 1])


@pytest.mark.parametrize(
    "name, close",
    [
        ("tenhc", "tench"),
        ("Gold Fish", "goldfish"),
        ("Cardigan Welsh Corgy", "cardigan welsh corgi"),
    ],
)
def test_a_name_that_is_no_label_suggests_one(name, close):
    images = np.zeros((1, 4, 4, 3), np.uint8)
    message = f"label='{name.casefold()}' is not one of: tench.*mean '{close}'"
    with pytest.raises(UserError, match=message):
        recognition.recognition(says(0), images, [{"tench", name}])


def test_nothing_is_no_name():
    images = np.zeros((1, 4, 4, 3), np.uint8)
    with pytest.raises(UserError, match="label='' is not one of"):
        recognition.recognition(says(0), images, [{" "}])


# --- in the panel and in an evaluation ------------------------------------------------


def settings(folder, *metrics):
    cfg = fields.panel()
    cfg.metrics, cfg.classifier = metrics, str(folder)
    return cfg


def named_by_pytorch(model, folder, images):
    return [LABELS[i] for i in logits(model, prepared(folder, images)).argmax(axis=1)]


@pytest.mark.parametrize("kind", ["bottleneck", "vit"])
def test_panel_measures_recognition_of_things_and_skips_styles(models, kind):
    model, folder = models[kind]
    images = pictures(64, 64)
    names = named_by_pytorch(model, folder, images)
    assert len(set(names)) > 1
    judges = suite.MetricSuite(settings(folder, "recognition", "sharpness"))
    exhibit = suite.EvalSet(images, right=[{names[0]}] * len(images))
    recognised, _ = judges.measure(exhibit)
    expected = [float(name == names[0]) for name in names]
    np.testing.assert_array_equal(recognised.samples, expected)
    assert not judges.skipped
    assert recognised.how == load(str(folder)).how
    right = [{"noto"}] * len(images)
    styles = judges.measure(exhibit.replace(right=right, trait="style"))
    assert [value.name for value in styles] == ["sharpness"]
    assert "no names of a style" in judges.skipped["recognition"]


def test_names_are_checked_before_weights_are_loaded(resnet, tmp_path, monkeypatch):
    _, folder = resnet
    monkeypatch.setattr(recognition.weights, "load_component", pytest.fail)
    recognition.check_names(str(folder), "thing", {LABELS[0]})
    with pytest.raises(UserError, match="label='no such thing' is not one of"):
        recognition.check_names(str(folder), "thing", {"no such thing"})
    recognition.check_names(str(folder), "style", {"no such thing"})
    recognition.check_names(str(tmp_path / "none"), "thing", {"no such thing"})


def test_panel_skips_a_classifier_that_is_not_here(tmp_path):
    judges = suite.MetricSuite(settings(tmp_path / "none", "recognition", "sharpness"))
    assert "put config.json, preproc" in judges.skipped["recognition"]
    values = judges.measure(suite.EvalSet(pictures(64, 64), right=[{"purse"}] * 5))
    assert [value.name for value in values] == ["sharpness"]


def test_evaluation_recognises_what_pytorch_names(resnet, tmp_path, monkeypatch):
    drawn = pictures(64, 64, 4)
    names = named_by_pytorch(*resnet, drawn)
    right = names[0]
    expected = [float(name == right) for name in names]
    assert 0 < sum(expected) < 4
    monkeypatch.setattr(
        images,
        "draw_images",
        lambda model, unet, told, cfg, first: drawn[first : first + 2],
    )
    configs = pathlib.Path(gift_jax.__file__).parents[1] / "configs"
    flags = {
        "panel.metrics": "recognition",
        "panel.classifier": resnet[1],
        "right": right.upper(),  # whose synonyms a comma parts
        "samples.batch": 2,
    }
    argv = [f"--config={configs / 'emoji_evaluate.py'}:smoke", f"--workdir={tmp_path}"]
    assert evaluate.main(argv + [f"--config.{k}={v}" for k, v in flags.items()]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    (found,) = results["metrics"]
    assert found["samples"] == expected
    assert found["how"]["backbone"] == resnet[1].name
    assert not results["skipped"]


# --- what a user may get wrong --------------------------------------------------------


def rename(folder, file, **changed):
    """Changes fields of a folder's JSON file."""
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "model.safetensors"]
)
def test_a_missing_file_is_named(resnet, tmp_path, name):
    folder = shutil.copytree(resnet[1], tmp_path / "copy")
    (folder / name).unlink()
    message = f"config.panel.classifier='.*copy/{name} is missing"
    with pytest.raises(MissingWeights, match=message) as caught:
        recognition.load(str(folder))
    assert "\n" not in str(caught.value)


def test_a_pickle_is_never_loaded(resnet, tmp_path):
    folder = shutil.copytree(resnet[1], tmp_path / "copy")
    weights = folder / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(MissingWeights, match="only pytorch_model.bin, a pickle"):
        recognition.load(str(folder))


PROCESSOR = "preprocessor_config.json"


@pytest.mark.parametrize(
    "kind, file, fields, message",
    [
        ("vit", "config.json", {"architectures": ["ViTModel"]}, "one of ResNetForImag"),
        ("vit", "config.json", {"hidden_act": "laplace"}, "hidden_act='laplace' is no"),
        ("vit", "config.json", {"num_channels": 1}, "num_channels=1 is not supported"),
        ("vit", "config.json", {"id2label": None}, "id2label must have a name for"),
        ("vit", "config.json", {"id2label": {"1": "a", "2": "b"}}, "id2label must"),
        ("vit", "config.json", {"id2label": {"0": "a"}}, "but config.json says"),
        ("vit", PROCESSOR, {"size": square(48)}, "makes 48 pixels .* image_size=32"),
        ("vit", PROCESSOR, {"size": {"height": 32, "width": 40}}, "must be of a squa"),
        ("bottleneck", "config.json", {"layer_type": "wide"}, "layer_type='wide' is"),
        ("bottleneck", "config.json", {"layer_type": "basic"}, "but config.json says"),
        (
            "bottleneck",
            "config.json",
            {"downsample_in_bottleneck": True},
            "downsample_in_bottleneck=True is not supported",
        ),
        (
            "bottleneck",
            PROCESSOR,
            {"image_processor_type": "DeiTImageProcessor"},
            "image_processor_type='DeiTImageProcessor' is not supported",
        ),
        ("bottleneck", PROCESSOR, {"crop_pct": 1.5}, r"crop_pct=1.5 .* in \(0, 1\]"),
        ("bottleneck", PROCESSOR, {"resample": 9}, "resample=9 must be one of PIL's"),
        ("bottleneck", PROCESSOR, {"do_rescale": False}, "do_rescale=false is not"),
        ("bottleneck", PROCESSOR, {"rescale_factor": 1.0}, "rescale_factor=1.0 must"),
        ("bottleneck", PROCESSOR, {"size": square(40)}, "must say shortest_edge"),
    ],
)
def test_an_unsupported_setting_is_named(models, tmp_path, kind, file, fields, message):
    folder = shutil.copytree(models[kind][1], tmp_path / "copy")
    rename(folder, file, **fields)
    with pytest.raises(UserError, match=message) as caught:
        recognition.load(str(folder))
    assert not isinstance(caught.value, MissingWeights)
    assert "\n" not in str(caught.value)


def test_styles_are_not_imagenets(resnet):
    with pytest.raises(UserError, match="names of things, none of a style; judge has"):
        recognition.load(str(resnet[1]), "style")
    with pytest.raises(UserError, match="trait='colour' is not one of: thing, style"):
        recognition.load(str(resnet[1]), "colour")


def test_a_word_is_no_classifier():
    message = "config.panel.classifier='juge' is not one of: judge, a folder.*'judge'"
    with pytest.raises(UserError, match=message) as caught:
        recognition.load("juge")
    assert not isinstance(caught.value, MissingWeights)
    with pytest.raises(UserError, match=message):
        suite.check(settings("juge", "recognition"))


def test_a_hub_id_out_of_reach_says_what_to_do(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = "config.panel.classifier='someone/resnet'.*out of reach; or put config"
    with pytest.raises(MissingWeights, match=message):
        recognition.load("someone/resnet")


def test_the_hub_is_asked_for_no_pickle(asked_of_hub):
    import huggingface_hub

    with pytest.raises(MissingWeights, match="config.json is missing"):
        recognition.load("someone/resnet@v2")
    names = ["config.json", "preprocessor_config.json", "model.safetensors"]
    others = ["pytorch_model.bin", "flax_model.msgpack", "vocab.json", "tf_model.h5"]
    wanted = huggingface_hub.utils.filter_repo_objects(
        names + others, allow_patterns=asked_of_hub["allow_patterns"]
    )
    assert list(wanted) == names
    assert asked_of_hub["revision"] == "v2"
