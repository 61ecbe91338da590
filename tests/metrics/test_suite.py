# SPDX-License-Identifier: Apache-2.0
"""The panel: every metric's values, what it skips, what it says of itself."""

import jax
import numpy as np
import pytest
from absl import logging

from gift_jax import fields
from gift_jax.data.sources import emoji
from gift_jax.metrics import judge, nudity, recognition, suite
from gift_jax.metrics.base import MissingWeights
from gift_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def shown():
    """The embedded set."""
    return emoji.load()


def of(shown, thing, **others):
    rows = shown.concept_ids == shown.concepts.index(thing)
    return shown.images[rows]


@pytest.fixture(scope="module")
def exhibit(shown):
    bombs = of(shown, "bomb")
    return suite.EvalSet(
        images=bombs[:4],
        prompts=[f"{style} bomb" for style in emoji.STYLES[:4]],
        right=[{"bomb"}] * 4,
        references=bombs,
        training=bombs[4:],
    )


def settings(*metrics, **others):
    cfg = fields.panel()
    cfg.metrics = metrics
    cfg.update(others)
    return cfg


OFFLINE = (
    *("recognition", "clip_score", "similarity", "nearest", "judge_distance"),
    *("fid", "kid", "precision_recall", "niqe", "sharpness"),
)


def test_judge_alone_gives_every_offline_metric(shown, exhibit):
    judges = suite.MetricSuite(settings(*OFFLINE), natural=shown.images[:60])
    found = {value.name: value for value in judges.measure(exhibit)}
    assert set(found) == {
        *("recognition", "judge_score", "judge_i", "judge_nearest"),
        *("judge_distance", "judge_distance_nearest"),
        *("fd", "kd", "precision", "recall", "niqe_fitted", "sharpness"),
    }
    assert not judges.skipped
    assert set(judges.said) == set(found)
    for value in found.values():
        assert np.isfinite(value.value) and value.how and value.higher
        assert value.samples is None or len(value.samples) == 4
    assert found["recognition"].value == 1.0
    assert found["judge_i"].value < found["judge_nearest"].value <= 1.0 + 1e-6
    cats = exhibit.replace(images=of(shown, "cat face")[:4])
    others = {value.name: value for value in judges.measure(cats)}
    assert others["recognition"].value == 0.0
    for name in ("judge_i", "judge_score", "judge_nearest"):
        assert others[name].value < found[name].value
    for name in ("fd", "judge_distance", "judge_distance_nearest"):
        assert others[name].value > found[name].value


def test_style_is_a_trait_of_its_own(exhibit):
    judges = suite.MetricSuite(settings("recognition"))
    right = [{style} for style in emoji.STYLES[:4]]
    styles = exhibit.replace(right=right, trait="style")
    assert judges.measure(styles)[0].value == 1.0
    wrong = styles.replace(right=right[::-1])
    assert judges.measure(wrong)[0].value == 0.0


def test_missing_weights_and_references_are_noted_once(exhibit, monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(logging, "warning", lambda *args: said.append(args))

    def absent():
        raise MissingWeights("needs the package nudenet")

    monkeypatch.setattr(nudity, "load", absent)
    cfg = settings("lpips", "nudity", "similarity", "niqe", "sharpness")
    cfg.backbones, cfg.lpips = ("judge", str(tmp_path)), str(tmp_path / "none")
    judges = suite.MetricSuite(cfg)
    assert set(judges.skipped) == {
        *("lpips", "nudity", "niqe", f"similarity by {tmp_path}"),
    }
    assert "lpips_alex.safetensors" in judges.skipped["lpips"]
    assert {v.name for v in judges.measure(exhibit)} == {"judge_i", "sharpness"}
    bare = suite.EvalSet(exhibit.images)
    for _ in range(2):
        assert {v.name for v in judges.measure(bare)} == {"sharpness"}
    assert judges.skipped["similarity"] == "these pictures have no references"
    assert len(said) == len(judges.skipped)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"metrics": ("clip",)}, "config.panel.metrics='clip' is not one of"),
        ({"protocols": ("imma",)}, "protocols='imma' .*did you mean 'imma-64px'"),
        ({"nudity_threshold": 0.1}, "nudity_threshold=0.1 must be in"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(change, message):
    cfg = settings("recognition", **change)
    with pytest.raises(UserError, match=message):
        suite.check(cfg)


def test_classifier_names_what_it_does_not_know():
    things = recognition.load("judge")
    images = np.zeros((1, 64, 64, 3), np.uint8)
    with pytest.raises(UserError, match="'bom' is not one of.*did you mean"):
        recognition.recognition(things, images, [{"bom"}])
    with pytest.raises(UserError, match="1 pictures, but 2 sets"):
        recognition.recognition(things, images, [{"bomb"}, {"bomb"}])
    assert things.how["version"] == judge.load().version


def test_measured_in_all_of_float32_on_any_device(monkeypatch, exhibit):
    seen = []

    def measure(x):
        yield from ()
        seen.append(jax.make_jaxpr(lambda a: a @ a)(np.eye(2)))

    monkeypatch.setitem(suite.METRICS, "sharpness", lambda _: measure)
    suite.MetricSuite(settings("sharpness")).measure(exhibit)
    assert "Precision.HIGHEST" in str(seen[0])
    assert "Precision.HIGHEST" not in str(jax.make_jaxpr(lambda a: a @ a)(np.eye(2)))
