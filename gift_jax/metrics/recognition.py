# SPDX-License-Identifier: Apache-2.0
"""Is it there? The share of pictures in which a classifier names what it should."""

import dataclasses
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gift_jax.metrics import backbone, judge, preprocessing, pretrained
from gift_jax.metrics.base import MetricResult, MissingWeights
from gift_jax.models import safetensors_io, vision, weights
from gift_jax.runtime.errors import UserError, choice

TRAITS = ("thing", "style")
_FIELD = "config.panel.classifier"
_FILES = ("config.json", "preprocessor_config.json")
_PROCESSORS = {  # kind of model: image processor of a file that names none
    "resnet_classifier": "ConvNext",
    "vit_classifier": "ViT",
}
_WANTED = pretrained.Wanted(
    field=_FIELD,
    kinds={
        "ResNetForImageClassification": "resnet_classifier",
        "ViTForImageClassification": "vit_classifier",
    },
    files=dict.fromkeys(_PROCESSORS, _FILES),
    optional=(),
    needed="config.json, preprocessor_config.json and model.safetensors",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """Names what a picture shows.

    Attributes: labels: names that it can say, one a class. scores: uint8 "B H W 3" ->
      float32 "B N", of each label. how: what it is, for a Value.
    """

    labels: tuple[str, ...]
    scores: Callable[[np.ndarray], np.ndarray]
    how: dict[str, Any]

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Returns the label of the highest score of each picture, indices, int "B"."""
        return np.argmax(self.scores(images), axis=1)

    def name(self, images: np.ndarray) -> list[str]:
        """Returns the name of what each picture shows."""
        return [self.labels[i] for i in self.classify(images)]


def traits(spec: str) -> tuple[str, ...]:
    """Returns what a classifier has names of: the judge of both, others of things."""
    return TRAITS if spec == "judge" else TRAITS[:1]


def check(spec: str, field: str = _FIELD) -> None:
    """Raises UserError for a word that is neither "judge" nor a folder or hub id."""
    if "/" not in spec and not os.path.isdir(os.path.expanduser(spec)):
        choice(field, spec, ("judge", "a folder", "a hub id (org/name)"))


def load(spec: str, trait: str = "thing") -> Classifier:
    """Returns the classifier, its weights in memory.

    Args: spec: "judge", emoji-sd's own, of things or of styles; a folder of
        transformers' ResNetForImageClassification or ViTForImageClassification, of
        things; or the hub id of one, "org/name" or "org/name@revision":
        microsoft/resnet-50, google/vit-base-patch16-224 ... Their labels are
        config.json's id2label; how names mean labels: see `meanings`.
      trait: of `traits`.
    Raises: MissingWeights if the folder, one of its files or the hub's model is not
      here, or has only pickles. UserError for another word or trait, an architecture or
      setting that is not supported, and for malformed files.
    Source: logits equal transformers' in PyTorch, behind the processor that the
      folder's preprocessor_config.json names (with PIL).
    """
    check(spec)
    choice("trait", trait, TRAITS)
    if trait not in traits(spec):
        raise UserError(
            f"{_FIELD}={spec!r} has names of things, none of a {trait}; judge has both"
        )
    return _judge(trait) if spec == "judge" else _pretrained(spec)


def _judge(trait):
    one = judge.load()
    labels, name_ND = one.concepts, one.concept_ND
    if trait == "style":
        labels, name_ND = one.styles, one.style_SD
    how = {
        "backbone": "judge",
        "version": one.version,
        "resolution": 64,
        "trait": trait,
        "labels": len(labels),
        "rule": "the nearest of all labels",
    }
    return Classifier(labels, lambda images: one.embed(images) @ name_ND.T, how)


def _pretrained(spec):
    folder, name = pretrained.find(spec, _WANTED)
    kind = pretrained.check(folder, spec, _WANTED)
    labels = _labels(folder / "config.json")
    model, params, _ = weights.load_component(folder, kind)
    prepared = preprocessing.read_reference(folder, _PROCESSORS[kind])
    if kind == "vit_classifier":  # a ResNet takes any size
        prepared = preprocessing.of_size(folder, prepared, model.config.image_size)
    params = jax.tree.map(jnp.asarray, params)
    logits = jax.jit(lambda p, x_BCHW: vision.apply_classifier(model, p, x_BCHW))

    def scores(images: np.ndarray) -> np.ndarray:
        return backbone.of_pictures(
            lambda x_BCHW: logits(params, x_BCHW),
            images,
            lambda part: preprocessing.standard(part, prepared),
        )

    how = {
        "backbone": name,
        "version": weights.content_hash(folder)[:12],
        "resolution": prepared.side,
        "trait": "thing",
        "labels": len(labels),
        "rule": "top-1",
    }
    return Classifier(labels, scores, how)


def _labels(file: Path) -> tuple[str, ...]:
    """Returns config.json's id2label in order; UserError if it leaves out a class."""
    found = safetensors_io.read_json(file).get("id2label")
    named = found if isinstance(found, dict) else {}
    labels = [named.get(str(i)) for i in range(len(named))]
    if not labels or not all(isinstance(label, str) and label for label in labels):
        raise UserError(
            f"{file}: id2label must have a name for each class, 0, 1, 2 ...: it is "
            "what the classifier can say"
        )
    return tuple(labels)


def meanings(labels: Sequence[str]) -> dict[str, set[int]]:
    """Returns {name: labels that it means, as indices}, of every name there is.

    A label such as "tench, Tinca tinca" goes by each of the synonyms that commas part,
    and by the whole. A name that is itself a whole label means that alone ("cardigan":
    the garment, not "Cardigan, Cardigan Welsh corgi"), else all labels that it is a
    synonym in. Labels that read alike ("crane", the bird and the machine) are one.
    Names are as `_plain` has them.
    """
    wholes: dict[str, set[int]] = {}
    synonyms: dict[str, set[int]] = {}
    for i, label in enumerate(labels):
        wholes.setdefault(_plain(label), set()).add(i)
        for part in label.split(","):
            synonyms.setdefault(_plain(part), set()).add(i)
    return synonyms | wholes


def _plain(name: str) -> str:
    """Returns a name without what tells no names apart: letter case, more spaces."""
    return " ".join(name.casefold().split())


def labels_meant(labels: Sequence[str], names: Collection[str]) -> dict[str, set[int]]:
    """Returns {name: labels that it means, as indices}.

    Raises: UserError for a name that means none.
    """
    known, meant = meanings(labels), {}
    for name in sorted(names):
        plain = choice("the classifier's label", _plain(name), tuple(known))
        meant[name] = known[plain]
    return meant


def check_names(spec: str, trait: str, names: Collection[str]) -> None:
    """Raises UserError for a name that a classifier cannot say, before it is loaded.

    Nothing is said where `load` would miss a file, or the classifier has no such trait.
    """
    if trait not in traits(spec):
        return
    if spec == "judge":
        labels = _judge(trait).labels  # loaded once
    else:
        try:
            labels = _labels(pretrained.find(spec, _WANTED)[0] / "config.json")
        except MissingWeights:
            return
    labels_meant(labels, names)


def recognition(
    classifier: Classifier, images: np.ndarray, right: Sequence[Collection[str]]
) -> MetricResult:
    """Returns the share of pictures that are named right; samples: 1 or 0.

    Args: images: uint8 "N H W 3". right: N sets of names, any of which will do; which
      labels they mean: see `meanings`.
    Raises: UserError if a name means no label of the classifier, or the counts differ.
    """
    if len(right) != len(images):
        raise UserError(f"{len(images)} pictures, but {len(right)} sets of names")
    meant = labels_meant(classifier.labels, set().union(*right))
    said = classifier.classify(images)
    samples = [
        float(any(label in meant[name] for name in names))
        for label, names in zip(said, right, strict=True)
    ]
    samples = np.asarray(samples, np.float32)
    higher = "more often recognised"
    value = float(np.mean(samples))
    return MetricResult("recognition", value, samples, higher, dict(classifier.how))
