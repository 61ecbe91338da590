# SPDX-License-Identifier: Apache-2.0
"""A metric's number, which never travels without what it was made with."""

import dataclasses
from typing import Any

import numpy as np

from gift_jax.runtime.errors import UserError


class MissingWeights(UserError):  # noqa: N818 - what is missing, not an error's kind
    """A metric's weights or package are not here; the message says which, and how to
    get them. Whoever evaluates skips the metric and says so.
    """


@dataclasses.dataclass(frozen=True)
class MetricResult:
    """What one metric says of one set of pictures.

    Attributes: name: of the metric, such as "clip_score". value: over all pictures.
      samples: float32 "N", of each picture; None where it is a number of the set only.
      higher: what a higher value means, in a word or two. how: everything that another
      person needs to get the same number: backbone, version (of its files or package),
      resolution, protocol, scale, threshold ...; what JSON can say.
    """

    name: str
    value: float
    samples: np.ndarray | None
    higher: str
    how: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Returns it as results.json holds it, samples rounded to 5 places."""
        found = {"metric": self.name, "value": round(float(self.value), 6)}
        if self.samples is not None:
            found["samples"] = [round(float(x), 5) for x in self.samples]
        return found | {"higher": self.higher, "how": self.how}
