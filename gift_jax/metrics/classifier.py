# SPDX-License-Identifier: Apache-2.0
"""Is it there? The share of pictures in which a classifier names what it should."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from gift_jax import config
from gift_jax.config import UserError
from gift_jax.metrics import judge
from gift_jax.metrics.value import Value

TRAITS = ("thing", "style")


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """Names what a picture shows.

    Attributes: labels: names that it can say. classify: uint8 "B H W 3" -> int "B",
      indices into labels. how: what it is, for a Value.
    """

    labels: tuple[str, ...]
    classify: Callable[[np.ndarray], np.ndarray]
    how: dict[str, Any]

    def name(self, images: np.ndarray) -> list[str]:
        """Returns the name of what each picture shows."""
        return [self.labels[i] for i in self.classify(images)]


def load(spec: str, trait: str = "thing") -> Classifier:
    """Returns the classifier: "judge", emoji-sd's own, of things or of styles.

    Raises: UserError for another spec or trait.
    """
    config.choice("config.panel.classifier", spec, ("judge",))
    config.choice("trait", trait, TRAITS)
    one = judge.load()
    labels = one.concepts if trait == "thing" else one.styles
    how = {
        "backbone": "judge",
        "version": one.version,
        "resolution": 64,
        "trait": trait,
        "labels": len(labels),
        "rule": "the nearest of all labels",
    }
    place = TRAITS.index(trait)
    return Classifier(labels, lambda images: one.name(images)[place], how)


def recognition(
    classifier: Classifier, images: np.ndarray, right: Sequence[Collection[str]]
) -> Value:
    """Returns the share of pictures that are named right; samples: 1 or 0.

    Args: images: uint8 "N H W 3". right: N sets of names, any of which will do.
    Raises: UserError if a name is no label of the classifier, or the counts differ.
    """
    if len(right) != len(images):
        raise UserError(f"{len(images)} pictures, but {len(right)} sets of names")
    for name in sorted(set().union(*right)):
        if name not in classifier.labels:
            config.choice("the classifier's label", name, classifier.labels)
    said = classifier.name(images)
    samples = [float(s in names) for s, names in zip(said, right, strict=True)]
    samples = np.asarray(samples, np.float32)
    higher = "more often recognised"
    value = float(np.mean(samples))
    return Value("recognition", value, samples, higher, dict(classifier.how))
