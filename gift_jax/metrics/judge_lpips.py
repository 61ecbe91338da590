# SPDX-License-Identifier: Apache-2.0
"""How far apart two images look to emoji-sd's own judge: LPIPS's construction.

Unweighted, on the judge's stages; it needs no file, and is not LPIPS.
"""

import functools

import jax
import jax.numpy as jnp

from gift_jax.metrics import backbone, lpips, towers
from gift_jax.metrics.base import EvalSet, Metric, MetricResult


@functools.lru_cache(maxsize=1)
def load() -> lpips.Distance:
    """Returns the distance on the judge's stages; loaded once.

    Source: ours; `towers.judge_stages` with the sum of `lpips`.
    """
    stages_of, side = towers.judge_stages(backbone.JUDGE)
    even = jnp.ones((1, 1, 1))
    scale = jax.jit(lambda stages: [lpips.unit_channels(h, even) for h in stages])
    provenance = backbone.load("judge").provenance | {
        "note": "LPIPS's construction without learned weights; not LPIPS",
    }
    span = lpips.RANGES["standard"]

    def stages(x_BHWC):
        return scale(stages_of(x_BHWC))

    return lpips.Distance("judge_lpips", side, stages, span, provenance)


def measure(eval_set: EvalSet, *_) -> list[MetricResult]:
    return lpips.results(load(), eval_set)


METRIC = Metric(
    "judge_lpips",
    "the sum of LPIPS on the judge's stages, without learned weights",
    measure,
    needs=("reference_images",),
)
