# SPDX-License-Identifier: Apache-2.0
"""The registry of metrics: one module each, here or anywhere on the path."""

import json
import textwrap

import numpy as np
import pytest

from gift_jax.metrics import backbone, base, nudity, suite
from gift_jax.metrics.base import EvalSet
from gift_jax.metrics.settings import Settings
from gift_jax.runtime import config
from gift_jax.runtime.errors import UserError

STRANGER = """
    from gift_jax.metrics.base import Metric, mean_result

    def measure(eval_set, settings, backbone):
        samples = eval_set.images.mean(axis=(1, 2, 3))
        yield mean_result("brightness", samples, "brighter", {"scale": "0..255"})

    METRIC = Metric("brightness", "mean of all values", measure)
"""


def test_every_metric_says_what_it_is():
    names = base.names()
    assert {"clip_score", "frechet_distance", "cmmd", "sharpness"} <= set(names)
    fields = set(EvalSet.__dataclass_fields__)
    for name in names:
        metric = base.load(name)
        assert metric.name == name and metric.title
        assert set(metric.needs) <= fields
        assert set(metric.backbones) <= set(backbone.IMAGES)


def test_a_metric_from_elsewhere_is_a_dotted_path(tmp_path, monkeypatch):
    (tmp_path / "their_metrics").mkdir()
    file = tmp_path / "their_metrics" / "brightness.py"
    file.write_text(textwrap.dedent(STRANGER))
    monkeypatch.syspath_prepend(tmp_path)
    cfg = config.to_config(Settings)
    cfg.names = ("their_metrics.brightness",)
    measured = suite.MetricSuite(config.resolve(cfg, Settings, "config.metrics"))
    (result,) = measured.measure(EvalSet(np.full((2, 4, 4, 3), 7, np.uint8)))
    assert (result.name, result.value) == ("brightness", 7.0)
    assert measured.descriptions["brightness"]["higher_means"] == "brighter"


@pytest.mark.parametrize(
    "name, message",
    [
        ("clip_scor", "metric='clip_scor' is not one of: .*mean 'clip_score'"),
        ("suite", "metric='suite' is not one of"),
        ("", "metric='' is not one of"),
        ("../base", "is not one of"),
        (".base", "is not one of"),
        ("no_package.metric", "cannot be imported: No module named 'no_package'"),
        ("gift_jax.metrics.suite", "must be a module with a METRIC"),
    ],
)
def test_an_unknown_metric_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        base.load(name)


def test_a_result_is_json():
    result = base.mean_result("x", np.float64([0.25, 0.5]), "more", {"scale": 1})
    assert result.samples.dtype == np.float32
    assert json.loads(json.dumps(result.as_json())) == {
        "metric": "x",
        "value": 0.375,
        "samples": [0.25, 0.5],
        "higher_means": "more",
        "provenance": {"scale": 1},
    }


@pytest.mark.parametrize(
    "change, message",
    [
        ({"names": ("clip",)}, "config.metrics.names='clip' is not one of"),
        ({"names": ()}, "config.metrics.names is empty"),
        ({"protocols": ("imma",)}, "protocols='imma' .*did you mean 'imma-64px'"),
        ({"nudity_threshold": 0.1}, "nudity_threshold=0.1 must be at least 0.25"),
        ({"classifier": "juge"}, "metrics.classifier='juge' .*did you mean 'judge'"),
        ({"backbones": ("clip",)}, "metrics.backbones='clip' is not one of: judge"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(change, message):
    cfg = config.to_config(Settings)
    cfg.update(change)
    with pytest.raises(UserError, match=message):
        config.resolve(cfg, Settings, "config.metrics")


def test_the_lowest_threshold_is_the_detectors_own():
    cfg = config.to_config(Settings)
    cfg.nudity_threshold = nudity.CUT
    assert (
        config.resolve(cfg, Settings, "config.metrics").nudity_threshold == nudity.CUT
    )
