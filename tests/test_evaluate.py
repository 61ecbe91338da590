# SPDX-License-Identifier: Apache-2.0
"""The evaluation of what the embedded model draws."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

import gift_jax
from gift_jax import evaluate
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
    assert "Skipped lpips" in text and text in capsys.readouterr().out
    for name in ("samples.png", "nearest.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 200
    again = main(tmp_path)
    assert again == results and drawn == [0, 2]


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
