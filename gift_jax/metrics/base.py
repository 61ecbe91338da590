# SPDX-License-Identifier: Apache-2.0
"""The contract of a metric: what it is given, what it returns, how it is found.

A metric is one module with a `METRIC`: in this folder, then its name is the file's, or
anywhere on the path, then its name is the module's ("my_package.my_metric").
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np

from gift_jax.runtime.errors import UserError, choice, shown

LABEL_KINDS = ("concept", "style")


class UnavailableError(UserError):
    """A metric cannot be had here: its weights, package or labels are missing.

    The message says what, and how to get it. Whoever evaluates skips the metric.
    """


@dataclasses.dataclass(frozen=True)
class MetricResult:
    """What one metric says of one set of images.

    Attributes:
      name: of the number, such as "clip_score". value: over all images.
      samples: float32 "N", of each image; None where only the set has a number.
      higher_means: what a higher value means, in a few words.
      provenance: all that another person needs to get the same number: backbone,
        version (of its files or package), resolution, protocol, scale, threshold ...;
        what JSON can hold.
    """

    name: str
    value: float
    samples: np.ndarray | None
    higher_means: str
    provenance: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Returns it as results.json holds it, samples rounded to 5 places."""
        result = {"metric": self.name, "value": round(float(self.value), 6)}
        if self.samples is not None:
            result["samples"] = [round(float(x), 5) for x in self.samples]
        return result | {
            "higher_means": self.higher_means,
            "provenance": self.provenance,
        }


def mean_result(
    name: str, samples: np.ndarray, higher_means: str, provenance: dict[str, Any]
) -> MetricResult:
    """Returns the result whose value is the mean of its samples."""
    value = float(np.mean(samples, dtype=np.float64))
    samples = np.asarray(samples, np.float32)
    return MetricResult(name, value, samples, higher_means, provenance)


@dataclasses.dataclass(frozen=True)
class EvalSet:
    """Images, and what they are measured against; all but the images may be missing.

    Attributes:
      images: uint8 "N H W 3". prompts: N, what each should show, in words.
      accepted_labels: N sets of labels, any of which is right. label_kind: of
        `LABEL_KINDS`, what they are labels of.
      reference_images: uint8 "R H W 3", real images of it. training_images: uint8
        "T H W 3", what the model was last trained on. twin_images: uint8 "N H W 3",
        what another model draws for the same prompts from the same noise.
    """

    images: np.ndarray
    prompts: Sequence[str] | None = None
    accepted_labels: Sequence[Collection[str]] | None = None
    label_kind: str = "concept"
    reference_images: np.ndarray | None = None
    training_images: np.ndarray | None = None
    twin_images: np.ndarray | None = None

    def replace(self, **changes: Any) -> "EvalSet":
        """Returns a copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Metric:
    """How one metric is measured.

    Attributes:
      name: as configs name it. title: what it measures, in one line.
      measure: (eval_set, settings, backbone) -> its results. settings: of
        `settings.Settings`. backbone: a `backbone.Backbone`, or None if it takes none.
        It loads what else it needs, and raises `UnavailableError` if that is missing.
      needs: the fields of an `EvalSet` that it reads besides the images.
      fewest: of images, and of references where it reads these, that it needs.
      backbones: the kinds of backbone that it is measured with, once with each that is
        configured ("clip", "dino", "dinov2", "judge"); (): it takes none.
      check: (eval_set, settings) -> None, called before anything is drawn; raises
        `UserError` for what could not be measured afterwards, `UnavailableError` for
        what is missing here.
    """

    name: str
    title: str
    measure: Callable[[EvalSet, Any, Any], Iterable[MetricResult]]
    needs: tuple[str, ...] = ()
    fewest: int = 1
    backbones: tuple[str, ...] = ()
    check: Callable[[EvalSet, Any], None] | None = None


def load(name: str, field: str = "metric") -> Metric:
    """Returns the metric of a module in this folder, or of a dotted path.

    Args: field: what names it, for errors.
    Raises: UserError, with the choices, if there is no such module or `METRIC` in it.
    """
    dotted = "." in name
    if not all(part.isidentifier() for part in name.split(".")):
        choice(field, name, names())
    path = name if dotted else f"{__package__}.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not dotted and error.name == path:
            choice(field, name, names())
        raise UserError(f"{field}={shown(name)} cannot be imported: {error}") from error
    metric = getattr(module, "METRIC", None)
    if isinstance(metric, Metric):
        return metric
    if not dotted:
        choice(field, name, names())
    raise UserError(
        f"{field}={shown(name)} must be a module with a METRIC, a "
        "gift_jax.metrics.base.Metric"
    )


def names() -> tuple[str, ...]:
    """Returns the names of the metrics in this folder, sorted."""
    package = importlib.import_module(__package__)
    modules = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(
        name
        for name in modules
        if hasattr(importlib.import_module(f"{__package__}.{name}"), "METRIC")
    )
