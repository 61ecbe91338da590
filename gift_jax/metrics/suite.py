# SPDX-License-Identifier: Apache-2.0
"""A panel of metrics: loaded once, asked about one set of pictures after another."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from gift_jax.metrics import (
    backbone,
    frechet,
    lpips,
    nudity,
    quality,
    recognition,
    similarity,
)
from gift_jax.metrics.base import MetricResult, MissingWeights
from gift_jax.runtime.errors import UserError, choice

TRAITS = recognition.TRAITS


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """Pictures, and what they are judged against.

    Attributes: images: uint8 "N H W 3". prompts: N, what each should show, in words.
      right: N sets of names, any of which a classifier may say. trait: of `TRAITS`,
      what the names are of. references: uint8 "R H W 3", real pictures of it. training:
      uint8 "T H W 3", what the model was last trained on. Any but the images may be
      missing (None): the metrics that need it are skipped.
    """

    images: np.ndarray
    prompts: Sequence[str] | None = None
    right: Sequence[Collection[str]] | None = None
    trait: str = "thing"
    references: np.ndarray | None = None
    training: np.ndarray | None = None

    def replace(self, **changes: Any) -> "EvalSet":
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


Metric = Callable[[EvalSet], Iterator[MetricResult]]


class MetricSuite:
    """Metrics by name.

    Attributes: skipped: {metric: why}, of those whose weights or packages are missing,
      and of those that some pictures lack something for.
      said: {name of a Value: {"higher", "how"}}, of what was measured so far.

    Args: cfg: `fields.panel()`. natural: uint8 "N H W 3", pictures to fit niqe's idea
      of quality on; None: it is skipped.
    Raises: UserError for an unknown metric, protocol or classifier.
    """

    def __init__(self, cfg: Any, natural: np.ndarray | None = None):
        self.cfg, self.natural = cfg, natural
        self.skipped: dict[str, str] = {}
        self.said: dict[str, dict[str, Any]] = {}
        self._backbones: dict[tuple[str, str], backbone.Backbone] = {}
        self._metrics: dict[str, Metric] = {}
        check(cfg)
        for name in cfg.metrics:
            with self._skipping(name):
                self._metrics[name] = METRICS[name](self)

    def measure(self, exhibit: EvalSet) -> list[MetricResult]:
        """Returns the values of every metric that can be had.

        In all of float32 on every device: TPUs and GPUs round its products otherwise.
        """
        values = []
        for name, metric in self._metrics.items():
            missing = [n for n in NEEDS[name] if getattr(exhibit, n) is None]
            if missing:
                self.skip(name, f"these pictures have no {missing[0]}")
                continue
            with jax.default_matmul_precision("highest"):
                values += metric(exhibit)
        for value in values:
            self.said[value.name] = {"higher": value.higher, "how": value.how}
        return values

    def backbones(self, metric: str) -> list[backbone.Backbone]:
        """Returns the configured backbones in each protocol, loaded once."""
        found = []
        for spec in self.cfg.backbones:
            for protocol in self.cfg.protocols:
                if (spec, protocol) == ("judge", "imma-64px"):
                    continue  # the judge has one way to take pictures
                with self._skipping(f"{metric} by {spec}"):
                    key = spec, protocol
                    if key not in self._backbones:
                        self._backbones[key] = backbone.load(spec, protocol)
                    found.append(self._backbones[key])
        return found

    def skip(self, name: str, why: str) -> None:
        """Notes what is not measured, and warns of it once."""
        if name not in self.skipped:
            logging.warning("skipped %s: %s", name, why)
        self.skipped[name] = why

    @contextlib.contextmanager
    def _skipping(self, name: str) -> Iterator[None]:
        """Turns a MissingWeights into a note."""
        try:
            yield
        except MissingWeights as error:
            self.skip(name, str(error))


def _recognition(panel: MetricSuite) -> Metric:
    spec = panel.cfg.classifier
    judges = {
        trait: recognition.load(spec, trait) for trait in recognition.traits(spec)
    }

    def measure(x: EvalSet) -> Iterator[MetricResult]:
        if x.trait in judges:
            yield recognition.recognition(judges[x.trait], x.images, x.right)
        else:
            panel.skip("recognition", f"{spec} has no names of a {x.trait}")

    return measure


def _by_backbone(name: str, of: Callable[[Any, EvalSet], MetricResult]) -> Callable:
    def build(panel: MetricSuite) -> Metric:
        backbones = panel.backbones(name)
        if name == "clip_score":
            backbones = [b for b in backbones if b.texts is not None]

        def measure(x: EvalSet) -> Iterator[MetricResult]:
            yield from (_with_protocol(of(b, x), b.protocol) for b in backbones)

        return measure

    return build


def _with_protocol(value: MetricResult, protocol: str) -> MetricResult:
    """Returns the value under a name of its own where the protocol is not usual."""
    if protocol == "standard":
        return value
    return dataclasses.replace(value, name=f"{value.name} {protocol}")


def _lpips(panel: MetricSuite) -> Metric:
    distances = [
        lpips.load(panel.cfg.lpips or None, protocol=protocol)
        for protocol in panel.cfg.protocols
    ]
    return lambda x: (
        _with_protocol(value, distance.how["protocol"])
        for distance in distances
        for value in _lpips_results(distance, x)
    )


def _judge_distance(panel: MetricSuite) -> Metric:
    distance = lpips.judge_distance()
    return lambda x: iter(_lpips_results(distance, x))


def _lpips_results(distance: lpips.Distance, x: EvalSet) -> list[MetricResult]:
    values = [lpips.pairs(distance, x.images, x.references).mean()]
    if x.training is not None:
        values.append(lpips.pairs(distance, x.images, x.training).nearest())
    return values


def _nudity(panel: MetricSuite) -> Metric:
    detector, cut = nudity.load(), panel.cfg.nudity_threshold
    return lambda x: iter([nudity.exposed(detector, x.images, cut)])


def _niqe(panel: MetricSuite) -> Metric:
    if panel.natural is None:
        raise MissingWeights("no pictures to fit it on were given")
    natural = quality.fit(panel.natural)
    return lambda x: iter([quality.niqe(natural, x.images)])


def _sharpness(panel: MetricSuite) -> Metric:
    return lambda x: iter([quality.sharpness(x.images)])


def _features(measure: Callable) -> Callable[[Any, EvalSet], Any]:
    def of(b: backbone.Backbone, x: EvalSet) -> Any:
        return measure(b.images(x.references), b.images(x.images), b.how)

    return of


def _precision_recall(panel: MetricSuite) -> Metric:
    backbones = panel.backbones("precision_recall")
    of = _features(frechet.precision_recall)
    return lambda x: (
        _with_protocol(v, b.protocol) for b in backbones for v in of(b, x)
    )


METRICS: dict[str, Callable[[MetricSuite], Metric]] = {
    "recognition": _recognition,
    "clip_score": _by_backbone(
        "clip_score", lambda b, x: similarity.text_image(b, x.images, x.prompts)
    ),
    "similarity": _by_backbone(
        "similarity", lambda b, x: similarity.image_image(b, x.images, x.references)
    ),
    "nearest": _by_backbone(
        "nearest", lambda b, x: similarity.nearest(b, x.images, x.training)
    ),
    "lpips": _lpips,
    "judge_distance": _judge_distance,
    "nudity": _nudity,
    "fid": _by_backbone("fid", _features(frechet.fid)),
    "kid": _by_backbone("kid", _features(frechet.kid)),
    "precision_recall": _precision_recall,
    "niqe": _niqe,
    "sharpness": _sharpness,
}
NEEDS = {name: ("references",) for name in METRICS} | {
    "recognition": ("right",),
    "clip_score": ("prompts",),
    "nearest": ("training",),
    **{name: () for name in ("nudity", "niqe", "sharpness")},
}


def check(cfg: Any, field: str = "config.panel") -> None:
    """Raises UserError naming the field of a `fields.panel()`, nothing loaded."""
    for name in ("metrics", "protocols"):
        if not cfg[name]:
            raise UserError(f"{field}.{name} is empty; name at least one")
    for name in cfg.metrics:
        choice(f"{field}.metrics", name, tuple(METRICS))
    for protocol in cfg.protocols:
        choice(f"{field}.protocols", protocol, backbone.PROTOCOLS)
    for name in cfg.backbones:
        recognition.check(name, f"{field}.backbones")
    recognition.check(cfg.classifier, f"{field}.classifier")
    if not nudity.LEAST <= cfg.nudity_threshold < 1:
        raise UserError(
            f"{field}.nudity_threshold={cfg.nudity_threshold} must be in "
            f"[{nudity.LEAST}, 1); try {field}.nudity_threshold={nudity.THRESHOLD}"
        )
