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


def test_every_number_says_what_made_it_and_pictures_are_drawn_once(
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
    assert len(list((tmp_path / "pictures").iterdir())) == 2
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setattr(
        images, "draw_images", lambda *a: drawn.append(a[-1]) or draw(*a)
    )
    results = main(tmp_path)
    assert drawn == [0, 2]
    assert results["pictures"] == 4
    found = {one["metric"]: one for one in results["metrics"]}
    for name in ("recognition", "judge_score", "judge_i", "judge_nearest", "fd"):
        assert {"backbone", "version", "resolution"} <= set(found[name]["how"])
    assert len(found["judge_i"]["samples"]) == 4
    assert found["judge_i"]["value"] == pytest.approx(
        np.mean(found["judge_i"]["samples"]), abs=1e-4
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
    assert {"judge_score", "judge_i"} <= {one["metric"] for one in results["metrics"]}
    hub = "--config.panel.backbones=judge,openai/clip-vit-base-patch32"
    other = main(tmp_path / "hub", hub, config="sd15_evaluate.py:smoke")
    (why,) = (v for k, v in other["skipped"].items() if k.startswith("similarity"))
    assert "openai/clip-vit-base-patch32" in why
    assert "judge_i" in {one["metric"] for one in other["metrics"]}


@pytest.mark.parametrize(
    "flag, message",
    [
        ("samples.num=0", "config.samples.num=0 must be at least 1"),
        ("panel.metrics=clip", "config.panel.metrics='clip' is not one of"),
        ("trait=colour", "config.trait='colour' is not one of: thing, style"),
        ("right=bom", "'bom' is not one of.*did you mean 'bomb'"),
        ("references.names=bom", "concept 'bom' is not in the data"),
        ("model=nowhere", "nowhere"),
        ("panel.classifier=resnet", "config.panel.classifier='resnet' is not one of"),
    ],
)
def test_mistake_is_one_line_and_writes_nothing(tmp_path, flag, message):
    with pytest.raises(UserError, match=message) as caught:
        main(tmp_path / "run", f"--config.{flag}")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
