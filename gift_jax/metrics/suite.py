# SPDX-License-Identifier: Apache-2.0
"""A suite of metrics: loaded once, measured on one set of images after another."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import logging

from gift_jax.metrics import backbone as backbone_module
from gift_jax.metrics import base
from gift_jax.metrics.backbone import Backbone
from gift_jax.metrics.base import EvalSet, Metric, MetricResult, UnavailableError
from gift_jax.metrics.settings import Settings
from gift_jax.runtime.errors import UserError


class MetricSuite:
    """Metrics by name, with the backbones that they share.

    Attributes:
      skipped: {metric: why}, of those that cannot be had here, and of those that some
        images lacked something for.
      descriptions: {name of a result: {"metric", "higher_means", "provenance"}}, of
        what was measured so far.
    """

    def __init__(self, settings: Settings):
        self.skipped: dict[str, str] = {}
        self.descriptions: dict[str, dict[str, Any]] = {}
        self._settings = settings
        self._metrics = [base.load(name) for name in settings.names]
        self._backbones: dict[tuple[str, str], Backbone | None] = {}

    def check(self, eval_set: EvalSet, count: int | None = None) -> None:
        """Raises UserError for what could not be measured of such images.

        What is known to be skipped is skipped now; to have nothing left is a mistake.

        Args: eval_set: whose images may not be there yet, "0 H W 3". count: how many
          there will be; None: they are there.
        """
        left = []
        for metric in self._metrics:
            reason = self._obstacle(metric, eval_set, count)
            if reason:
                self._skip(metric.name, reason)
                continue
            with self._skipping(metric.name):
                if metric.check:
                    metric.check(eval_set, self._settings)
                left.append(metric)
        if not left:
            name, reason = next(iter(self.skipped.items()))
            raise UserError(
                f"config.metrics.names: nothing is left to measure ({name}: {reason}); "
                "add what it needs, or another metric"
            )

    def measure(self, eval_set: EvalSet) -> list[MetricResult]:
        """Returns the results of every metric that can be had.

        All in float32 on every device: TPUs and GPUs round its products otherwise.
        """
        results: list[MetricResult] = []
        for metric in self._metrics:
            reason = self._obstacle(metric, eval_set)
            if reason:
                self._skip(metric.name, reason)
                continue
            with jax.default_matmul_precision("highest"):
                own = [*self._measure(metric, eval_set)]
            for result in own:
                self.descriptions[result.name] = {
                    "metric": metric.name,
                    "higher_means": result.higher_means,
                    "provenance": result.provenance,
                }
            results += own
        return results

    def backbones(self, metric: str, kinds: Sequence[str]) -> list[Backbone]:
        """Returns the configured backbones of some kinds in each protocol."""
        loaded = []
        for spec in self._settings.backbones:
            for protocol in self._settings.protocols:
                if spec == "judge" and protocol != "standard":
                    continue  # the judge has one way to take images
                with self._skipping(f"{metric} by {spec}"):
                    loaded.append(self._backbone(spec, protocol))
        usable = [backbone for backbone in loaded if backbone.kind in kinds]
        if loaded and not usable:
            self._skip(metric, _needs_backbone(kinds))
        return usable

    def _obstacle(
        self, metric: Metric, eval_set: EvalSet, count: int | None = None
    ) -> str:
        """Returns why a metric has no number for such images, or ""; see `check`."""
        for field in metric.needs:
            if getattr(eval_set, field) is None:
                return f"these images have no {field}"
        counts = {"images": len(eval_set.images) if count is None else count}
        if "reference_images" in metric.needs:
            counts["reference_images"] = len(eval_set.reference_images)
        for name, number in counts.items():
            if number < metric.fewest:
                return f"needs {metric.fewest} {name} or more; there are {number}"
        kinds = metric.backbones
        if kinds and "judge" not in kinds and {*self._settings.backbones} == {"judge"}:
            return _needs_backbone(kinds)
        return ""

    def _backbone(self, spec: str, protocol: str) -> Backbone:
        key = spec, protocol
        if key not in self._backbones:
            self._backbones[key] = backbone_module.load(spec, protocol)
        return self._backbones[key]

    def _measure(self, metric: Metric, eval_set: EvalSet) -> Iterator[MetricResult]:
        backbones: list[Backbone | None] = [None]
        if metric.backbones:
            backbones = [*self.backbones(metric.name, metric.backbones)]
        for backbone in backbones:
            with self._skipping(metric.name):
                for result in metric.measure(eval_set, self._settings, backbone):
                    yield _named_by_protocol(result)

    def _skip(self, name: str, reason: str) -> None:
        """Notes what is not measured, and warns of it once."""
        if name not in self.skipped:
            logging.warning("skipped %s: %s", name, reason)
        self.skipped[name] = reason

    @contextlib.contextmanager
    def _skipping(self, name: str) -> Iterator[None]:
        try:
            yield
        except UnavailableError as error:
            self._skip(name, str(error))


def _needs_backbone(kinds: Sequence[str]) -> str:
    return f"needs a backbone of the kind {' or '.join(kinds)}"


def _named_by_protocol(result: MetricResult) -> MetricResult:
    """Returns the result, with the protocol in its name where it is not the usual."""
    protocol = result.provenance.get("protocol", "standard")
    if protocol == "standard":
        return result
    return dataclasses.replace(result, name=f"{result.name} {protocol}")
