# SPDX-License-Identifier: Apache-2.0
"""Classifiers that name what an image shows: the judge, or an ImageNet model."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gift_jax.metrics import judge, preprocessing, pretrained, towers
from gift_jax.metrics.backbone import embed
from gift_jax.metrics.base import LABEL_KINDS, UnavailableError
from gift_jax.models import safetensors_io, weights
from gift_jax.runtime.errors import UserError, choice

_FIELD = "config.metrics.classifier"
_PROCESSORS = {  # kind of model: image processor of a file that names none
    "resnet_classifier": "ConvNext",
    "vit_classifier": "ViT",
}
_REQUIRED = pretrained.Requirements(
    field=_FIELD,
    kinds={
        "ResNetForImageClassification": "resnet_classifier",
        "ViTForImageClassification": "vit_classifier",
    },
    files=dict.fromkeys(_PROCESSORS, ("config.json", "preprocessor_config.json")),
    optional=(),
    description="config.json, preprocessor_config.json and model.safetensors",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """Names what an image shows.

    Attributes: labels: "N" names, one a class. scores: uint8 "B H W 3" -> float32
      "B N", of each label. provenance: what it is, for a result.
    """

    labels: tuple[str, ...]
    scores: Callable[[np.ndarray], np.ndarray]
    provenance: dict[str, Any]

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Returns the label of the highest score of each image, indices, int "B"."""
        return np.argmax(self.scores(images), axis=1)

    def name(self, images: np.ndarray) -> list[str]:
        """Returns the label of what each image shows."""
        return [self.labels[i] for i in self.classify(images)]


@functools.lru_cache(maxsize=4)
def load(spec: str, label_kind: str = "concept") -> Classifier:
    """Returns the classifier, its weights in memory; loaded once.

    Args: spec: "judge", emoji-sd's own, of concepts or of styles; a folder of
        transformers' ResNetForImageClassification or ViTForImageClassification, of
        concepts; or the hub id of one, "org/name" or "org/name@revision":
        microsoft/resnet-50, google/vit-base-patch16-224 ... Their labels are
        config.json's id2label; how names mean labels: see `meanings`.
      label_kind: of `LABEL_KINDS`.
    Raises: UnavailableError if the folder, one of its files or the hub's model is not
      here, or has only pickles, or it has no labels of that kind. UserError for another
      word, an architecture or setting that is not supported, and for malformed files.
    Source: logits equal transformers' in PyTorch, behind the processor that the
      folder's preprocessor_config.json names (with PIL).
    """
    pretrained.check_spec(_FIELD, spec)
    choice("label_kind", label_kind, LABEL_KINDS)
    if spec == "judge":
        return _judge(label_kind)
    if label_kind != "concept":
        raise UnavailableError(f"{_FIELD}={spec!r} has no labels of a {label_kind}")
    return _pretrained(spec)


def check_labels(spec: str, label_kind: str, names: Collection[str]) -> None:
    """Raises UserError for a name that is no label, before weights are loaded.

    Passes where `load` would raise UnavailableError.
    """
    if spec == "judge":
        labels = _judge(label_kind).labels
    elif label_kind != "concept":
        return
    else:
        try:
            folder, _ = pretrained.locate(spec, _REQUIRED)
            pretrained.check(folder, spec, _REQUIRED)
        except UnavailableError:
            return
        labels = _labels(folder / "config.json")
    labels_meant(labels, names)


def _judge(label_kind):
    named = judge.load()
    labels, name_ND = named.concepts, named.concept_ND
    if label_kind == "style":
        labels, name_ND = named.styles, named.style_SD
    provenance = named.backbone.provenance | {
        "label_kind": label_kind,
        "labels": len(labels),
        "rule": "the nearest of all labels",
    }
    images = named.backbone.images
    return Classifier(labels, lambda x_BHWC: images(x_BHWC) @ name_ND.T, provenance)


def _pretrained(spec):
    folder, name = pretrained.locate(spec, _REQUIRED)
    kind = pretrained.check(folder, spec, _REQUIRED)
    labels = _labels(folder / "config.json")
    logits, size = towers.classifier(folder, kind)
    steps = preprocessing.read_classifier(folder, _PROCESSORS[kind])
    if size:
        steps = preprocessing.check_size(folder, steps, size)
    prepare = functools.partial(preprocessing.standard, steps=steps)
    provenance = {
        "backbone": name,
        "version": weights.content_hash(folder)[:12],
        "resolution": steps.side,
        "label_kind": "concept",
        "labels": len(labels),
        "rule": "top-1",
    }
    return Classifier(labels, lambda x: embed(logits, x, prepare), provenance)


def _labels(file: Path) -> tuple[str, ...]:
    """Returns config.json's id2label in order; UserError if it leaves out a class."""
    names = safetensors_io.read_json(file).get("id2label")
    names = names if isinstance(names, dict) else {}
    labels = [names.get(str(i)) for i in range(len(names))]
    if not labels or not all(isinstance(label, str) and label for label in labels):
        raise UserError(
            f"{file}: id2label must have a name for each class, 0, 1, 2 ...: it is "
            "what the classifier can say"
        )
    return tuple(labels)


def meanings(labels: Sequence[str]) -> dict[str, set[int]]:
    """Returns {name: labels that it means, as indices}, of every name there is.

    A label such as "tench, Tinca tinca" goes by each of its synonyms, which commas
    separate, and by the whole. A name that is itself a whole label means that alone
    ("cardigan": the garment, not "Cardigan, Cardigan Welsh corgi"), else all labels
    that it is a synonym in. Labels that read alike ("crane", the bird and the machine)
    are one. Names are as `_plain` has them.
    """
    wholes: dict[str, set[int]] = {}
    synonyms: dict[str, set[int]] = {}
    for i, label in enumerate(labels):
        wholes.setdefault(_plain(label), set()).add(i)
        for part in label.split(","):
            synonyms.setdefault(_plain(part), set()).add(i)
    return synonyms | wholes


def _plain(name: str) -> str:
    """Returns a name without letter case and repeated spaces."""
    return " ".join(name.casefold().split())


def labels_meant(labels: Sequence[str], names: Collection[str]) -> dict[str, set[int]]:
    """Returns {name: labels that it means, as indices}.

    Raises: UserError for a name that means none.
    """
    by_name = meanings(labels)
    return {
        name: by_name[choice("the classifier's label", _plain(name), tuple(by_name))]
        for name in sorted(names)
    }
