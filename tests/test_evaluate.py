# SPDX-License-Identifier: Apache-2.0
"""The evaluation of what the embedded model draws."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

import gift_jax
from gift_jax import evaluate
from gift_jax.data.sources import emoji
from gift_jax.models import load
from gift_jax.runtime.config import load_config
from gift_jax.runtime.errors import UserError
from gift_jax.sampling import images
from gift_jax.sampling.images import draw_images

CONFIGS = pathlib.Path(gift_jax.__file__).parents[1] / "configs"


@pytest.fixture(autouse=True)
def cache(monkeypatch, pytestconfig):
    monkeypatch.setenv("GIFT_JAX_CACHE", str(pytestconfig.cache.mkdir("emoji")))
    monkeypatch.setenv("HF_HUB_CACHE", str(pytestconfig.cache.mkdir("no_hub")))


def main(workdir, *flags, config="emoji_evaluate.py:smoke"):
    argv = [f"--config={CONFIGS / config}", f"--workdir={workdir}", *flags]
    assert evaluate.main(argv) == 0
    return json.loads((workdir / "results.json").read_text())


def test_every_number_has_its_provenance_and_images_are_drawn_once(
    tmp_path, monkeypatch, capsys
):
    drawn = []
    draw = draw_images

    def stopped(*args):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(args[-1])
        return draw(*args)

    monkeypatch.setattr(images, "draw_images", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(tmp_path)
    assert len(list((tmp_path / "images").iterdir())) == 2
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setattr(
        images, "draw_images", lambda *a: drawn.append(a[-1]) or draw(*a)
    )
    results = main(tmp_path)
    assert drawn == [0, 2]
    assert results["images"] == 4
    rows = {one["metric"]: one for one in results["metrics"]}
    names = ("classifier_accuracy", "judge_score", "judge_image_similarity", "fd_judge")
    for name in names:
        assert {"backbone", "version", "resolution"} <= set(rows[name]["provenance"])
    assert len(rows["judge_image_similarity"]["samples"]) == 4
    assert rows["judge_image_similarity"]["value"] == pytest.approx(
        np.mean(rows["judge_image_similarity"]["samples"]), abs=1e-4
    )
    assert "lpips_alex.safetensors" in results["skipped"]["lpips"]
    text = (tmp_path / "results.md").read_text()
    shown = capsys.readouterr().out
    assert "Skipped lpips" in text and "Skipped lpips" in shown
    assert "backbone judge" in text and "backbone judge" not in shown
    for line in shown.splitlines():  # a table's row without what it was measured with
        assert line.removesuffix("|") in text
    for name in ("samples.png", "nearest.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 200
    again = main(tmp_path)
    assert again == results and drawn == [0, 2]


@pytest.mark.slow
def test_sd15_config_measures_what_can_be_had(tmp_path):
    results = main(tmp_path, config="sd15_evaluate.py:smoke")
    assert {"judge_score", "judge_image_similarity"} <= {
        one["metric"] for one in results["metrics"]
    }
    hub = "--config.metrics.backbones=judge,openai/clip-vit-base-patch32"
    other = main(tmp_path / "hub", hub, config="sd15_evaluate.py:smoke")
    (why,) = (v for k, v in other["skipped"].items() if k.startswith("similarity"))
    assert "openai/clip-vit-base-patch32" in why
    assert "judge_image_similarity" in {one["metric"] for one in other["metrics"]}


def test_a_variant_of_the_embedded_config_is_a_concept():
    for variant, concept in (("", "bomb"), (":pill", "pill"), (":smoke", "bomb")):
        cfg = load_config(str(CONFIGS / f"emoji_evaluate.py{variant}"), "evaluate")
        assert cfg.reference_images.names == cfg.training_images.names == (concept,)
        assert all(text.endswith(f" of a {concept}") for text in cfg.samples.prompts)
    with pytest.raises(UserError, match="unknown variant 'pil'"):
        load_config(str(CONFIGS / "emoji_evaluate.py:pil"), "evaluate")


@pytest.fixture
def drawn(tmp_path):
    """A folder of five images of the judge's size, of bombs."""
    data, folder = emoji.load(), tmp_path / "drawn"
    folder.mkdir()
    rows = np.flatnonzero(data.concept_ids == data.concepts.index("bomb"))[:5]
    for i, image in enumerate(data.images[rows]):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


def test_images_drawn_elsewhere_are_measured_without_a_model(
    drawn, tmp_path, monkeypatch
):
    monkeypatch.setattr(load, "load_model", None)
    flags = f"--config.images.folder={drawn}", "--config.model=nowhere"
    results = main(tmp_path / "run", *flags)
    assert results["model"] is None and results["images_folder"] == str(drawn)
    assert results["images"] == 5 and results["prompts"] is None
    rows = {one["metric"]: one for one in results["metrics"]}
    assert rows["classifier_accuracy"]["value"] == 1.0
    assert {"judge_image_similarity", "fd_judge", "recall_judge"} <= set(rows)
    assert results["skipped"]["clip_score"] == "these images have no prompts"
    text = (tmp_path / "run" / "results.md").read_text()
    assert f"5 images in {drawn}" in text and "Skipped clip_score: these" in text
    assert (tmp_path / "run" / "nearest.png").is_file()
    assert main(tmp_path / "run", *flags) == results
    (drawn / "4.png").unlink()
    with pytest.raises(UserError, match="base_sha256 was .*, is "):
        main(tmp_path / "run", *flags)


def test_captions_of_images_are_the_prompts(drawn, tmp_path):
    lines = [f"{i}.png,a {word}" for i, word in enumerate(["bomb", "cat face"])]
    (drawn / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    flags = f"--config.images.folder={drawn}", "--config.metrics.names=clip_score"
    results = main(tmp_path / "a", *flags)
    assert results["prompts"] == ["a bomb", "a cat face"]
    right, wrong = results["metrics"][0]["samples"]
    assert right > wrong  # both show bombs
    one = main(tmp_path / "b", *flags, "--config.images.prompt=a bomb")
    assert one["metrics"][0]["samples"][0] == right
    assert one["prompts"] == ["a bomb"] * 2


def test_metric_for_which_there_are_too_few_images_is_skipped(drawn, tmp_path):
    few = f"--config.images.folder={drawn}", "--config.reference_images.limit=1"
    results = main(tmp_path / "few", *few)
    names = ("frechet_distance", "kernel_distance", "precision_recall")
    for name in names:
        least = 4 if name == "precision_recall" else 2
        reason = f"needs {least} reference_images or more; there are 1"
        assert results["skipped"][name] == reason
    rows = {one["metric"] for one in results["metrics"]}
    assert {"classifier_accuracy", "judge_image_similarity", "sharpness"} <= rows
    text = (tmp_path / "few" / "results.md").read_text()
    assert "Skipped kernel_distance: needs 2 reference_images or more" in text


@pytest.mark.parametrize(
    "names, flag, message",
    [
        ("frechet_distance", "samples.num=1", "needs 2 images or more; there are 1"),
        ("cmmd", "samples.num=2", "cmmd: needs a backbone of the kind clip"),
        ("lpips,cmmd", "samples.num=2", "lpips: config.metrics.lpips=''"),
        ("nearest", "training_images.names=()", "nearest: these images have no train"),
    ],
)
def test_nothing_left_to_measure_is_a_mistake_before_drawing(
    tmp_path, monkeypatch, names, flag, message
):
    monkeypatch.setattr(evaluate, "draw_to_folder", None)
    message = f"config.metrics.names: nothing is left to measure .*{message}"
    flags = f"--config.metrics.names={names}", f"--config.{flag}"
    with pytest.raises(UserError, match=message):
        main(tmp_path / "run", *flags, "--config.samples.prompts=a bomb")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flag, message",
    [
        ("images.folder=nowhere", "config.images.folder=nowhere is not a folder"),
        ("images.crop=left", "config.images.crop='left' is not one of"),
        ("reference_images.names=()", ""),
        ("adapters.lora=x.safetensors", "config.adapters is for a model, and config.i"),
    ],
)
def test_mistakes_of_a_folder_of_images(drawn, tmp_path, flag, message):
    flags = [f"--config.images.folder={drawn}", f"--config.{flag}"]
    if not message:
        message = "config.reference_images.num_generated is for a model"
        flags += [
            f"--config.reference_images.{f}" for f in ("num_generated=2", "prompt=a")
        ]
    with pytest.raises(UserError, match=message):
        main(tmp_path / "run", *flags)
    Image.new("RGB", (20, 30)).save(drawn / "5.png")
    sizes = "its images are of 2 sizes, from 20 to 64 pixels; set .*resolution=20"
    with pytest.raises(UserError, match=sizes):
        main(tmp_path / "run", f"--config.images.folder={drawn}")
    (drawn / "5.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="5.png cannot be read as an image"):
        main(tmp_path / "run", f"--config.images.folder={drawn}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flag, message",
    [
        ("samples.num=0", "config.samples.num=0 must be at least 1"),
        ("metrics.names=clip", "config.metrics.names='clip' is not one of"),
        ("label_kind=color", "config.label_kind='color' is not one of: concept, style"),
        ("accepted_labels=bom", "'bom' is not one of.*did you mean 'bomb'"),
        ("reference_images.names=bom", "concept 'bom' is not in the data"),
        ("model=nowhere", "nowhere"),
        (
            "metrics.classifier=resnet",
            "config.metrics.classifier='resnet' is not one of",
        ),
    ],
)
def test_mistake_is_one_line_and_writes_nothing(tmp_path, flag, message):
    with pytest.raises(UserError, match=message) as caught:
        main(tmp_path / "run", f"--config.{flag}")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
