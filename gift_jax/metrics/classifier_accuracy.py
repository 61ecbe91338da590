# SPDX-License-Identifier: Apache-2.0
"""Is it there? The share of images whose label a classifier names."""

from collections.abc import Collection, Sequence

import numpy as np

from gift_jax.metrics import classifier
from gift_jax.metrics.base import EvalSet, Metric, MetricResult, mean_result
from gift_jax.metrics.classifier import Classifier
from gift_jax.metrics.settings import Settings
from gift_jax.runtime.errors import UserError


def accuracy(
    model: Classifier, images: np.ndarray, accepted: Sequence[Collection[str]]
) -> MetricResult:
    """Returns the share of images that are named right; samples: 1 or 0.

    Args: images: uint8 "N H W 3". accepted: N sets of names, any of which is right;
      which labels they mean: see `classifier.meanings`.
    Raises: UserError if a name means no label of the classifier, or the counts differ.
    """
    if len(accepted) != len(images):
        raise UserError(f"{len(images)} images, but {len(accepted)} sets of names")
    labels_of = classifier.labels_meant(model.labels, set().union(*accepted))
    samples = [
        any(label in labels_of[name] for name in names)
        for label, names in zip(model.classify(images), accepted, strict=True)
    ]
    higher_means = "more often recognized"
    provenance = dict(model.provenance)
    return mean_result("classifier_accuracy", samples, higher_means, provenance)


def check(eval_set: EvalSet, settings: Settings) -> None:
    names = set().union(*eval_set.accepted_labels)
    classifier.check_labels(settings.classifier, eval_set.label_kind, names)


def measure(eval_set: EvalSet, settings: Settings, _) -> list[MetricResult]:
    model = classifier.load(settings.classifier, eval_set.label_kind)
    return [accuracy(model, eval_set.images, eval_set.accepted_labels)]


METRIC = Metric(
    "classifier_accuracy",
    "share of images in which a classifier names the concept, or the style",
    measure,
    needs=("accepted_labels",),
    check=check,
)
