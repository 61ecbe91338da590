# SPDX-License-Identifier: Apache-2.0
"""The suite: every metric's results, what it skips, what it says of itself."""

import sys

import jax
import numpy as np
import pytest
from absl import logging

from gift_jax.data.sources import emoji
from gift_jax.metrics import base, nudity, suite
from gift_jax.metrics.settings import Settings
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def images_of():
    """(concept) -> its images in the embedded set."""
    data = emoji.load()
    return lambda name: data.images[data.concept_ids == data.concepts.index(name)]


@pytest.fixture(scope="module")
def eval_set(images_of):
    bombs = images_of("bomb")
    return base.EvalSet(
        images=bombs[:4],
        prompts=[f"{style} bomb" for style in emoji.STYLES[:4]],
        accepted_labels=[{"bomb"}] * 4,
        reference_images=bombs,
        training_images=bombs[4:],
    )


def suite_of(*names, **others):
    cfg = config.to_config(Settings)
    cfg.names = names
    cfg.update(others)
    return suite.MetricSuite(config.resolve(cfg, Settings, "config.metrics"))


OFFLINE = (
    *("classifier_accuracy", "clip_score", "similarity", "nearest", "judge_lpips"),
    *("frechet_distance", "kernel_distance", "precision_recall", "sharpness"),
)


def test_judge_alone_gives_every_offline_metric(images_of, eval_set):
    metrics = suite_of(*OFFLINE)
    results = {result.name: result for result in metrics.measure(eval_set)}
    assert set(results) == {
        *("classifier_accuracy", "judge_score"),
        *("judge_image_similarity", "judge_nearest_train"),
        *("judge_lpips", "judge_lpips_nearest_train", "sharpness"),
        *("fd_judge", "kd_judge", "precision_judge", "recall_judge"),
    }
    assert not metrics.skipped
    assert set(metrics.descriptions) == set(results)
    for result in results.values():
        assert np.isfinite(result.value) and result.provenance and result.higher_means
        assert result.samples is None or len(result.samples) == 4
    assert results["classifier_accuracy"].value == 1.0
    similarity = results["judge_image_similarity"].value
    assert similarity < results["judge_nearest_train"].value <= 1.0 + 1e-6
    cats = eval_set.replace(images=images_of("cat face")[:4])
    others = {result.name: result for result in metrics.measure(cats)}
    assert others["classifier_accuracy"].value == 0.0
    for name in ("judge_image_similarity", "judge_score", "judge_nearest_train"):
        assert others[name].value < results[name].value
    for name in ("fd_judge", "judge_lpips", "judge_lpips_nearest_train"):
        assert others[name].value > results[name].value


def test_style_is_a_kind_of_label(eval_set):
    metrics = suite_of("classifier_accuracy")
    labels = [{style} for style in emoji.STYLES[:4]]
    styles = eval_set.replace(accepted_labels=labels, label_kind="style")
    assert metrics.measure(styles)[0].value == 1.0
    wrong = styles.replace(accepted_labels=labels[::-1])
    assert metrics.measure(wrong)[0].value == 0.0


def test_what_is_missing_is_noted_once(eval_set, monkeypatch, tmp_path):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda *args: warnings.append(args))
    monkeypatch.setitem(sys.modules, "nudenet", None)  # import then fails
    nudity.load.cache_clear()
    names = ("lpips", "nudity", "similarity", "cmmd", "sharpness")
    backbones = ("judge", str(tmp_path))
    metrics = suite_of(*names, backbones=backbones, lpips=str(tmp_path / "none"))
    for _ in range(2):
        measured = {result.name for result in metrics.measure(eval_set)}
        assert measured == {"judge_image_similarity", "sharpness"}
    assert set(metrics.skipped) == {
        *("lpips", "nudity", "cmmd"),
        *(f"{name} by {tmp_path}" for name in ("similarity", "cmmd")),
    }
    assert "lpips_alex.safetensors" in metrics.skipped["lpips"]
    assert metrics.skipped["cmmd"] == "needs a backbone of the kind clip"
    bare = base.EvalSet(eval_set.images)
    assert [result.name for result in metrics.measure(bare)] == ["sharpness"]
    assert metrics.skipped["similarity"] == "these images have no reference_images"
    assert len(warnings) == len(metrics.skipped)


def test_labels_are_checked_before_there_are_images(eval_set):
    metrics = suite_of("classifier_accuracy")
    empty = eval_set.replace(images=eval_set.images[:0])
    metrics.check(empty, count=4)
    with pytest.raises(UserError, match="'bom' is not one of.*did you mean"):
        metrics.check(empty.replace(accepted_labels=[{"bom"}] * 4), count=4)
    with pytest.raises(UserError, match="nothing is left to measure .classifier_acc"):
        metrics.check(empty.replace(accepted_labels=None), count=4)


def test_metric_skips_too_few_images_and_the_others_run(eval_set):
    metrics = suite_of("precision_recall", "frechet_distance", "sharpness")
    few = eval_set.replace(images=eval_set.images[:3])
    metrics.check(few)
    assert [r.name for r in metrics.measure(few)] == ["fd_judge", "sharpness"]
    few = eval_set.replace(reference_images=eval_set.reference_images[:1])
    assert [r.name for r in metrics.measure(few)] == ["sharpness"]
    assert metrics.skipped == {
        "precision_recall": "needs 4 reference_images or more; there are 1",
        "frechet_distance": "needs 2 reference_images or more; there are 1",
    }


def test_measured_in_float32_on_any_device(monkeypatch, eval_set):
    traced = []

    def measure(*_):
        yield from ()
        traced.append(jax.make_jaxpr(lambda a: a @ a)(np.eye(2)))

    metric = base.Metric("sharpness", "", measure)
    monkeypatch.setattr(base, "load", lambda *_: metric)
    suite_of("sharpness").measure(eval_set)
    assert "Precision.HIGHEST" in str(traced[0])
    assert "Precision.HIGHEST" not in str(jax.make_jaxpr(lambda a: a @ a)(np.eye(2)))
