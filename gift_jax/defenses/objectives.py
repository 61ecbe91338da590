# SPDX-License-Identifier: Apache-2.0
"""The upper level's objectives, as pure functions of arrays.

Axes: B batch, N tokens, D width. Source: GIFT is arXiv:2507.13598.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gift_jax.diffusion import at_least_float32, normal_like, squared_error

BOUNDS = ("hinge", "log", "raw")
NOISE_TARGETS = ("standard", "matched")
DISTANCES = ("mse", "mmd")
MMD_KERNELS = 5  # as RepNoise: bandwidths 1/4, 1/2, 1, 2, 4 times the mean distance


def losses_by_concept(
    loss_B: jax.Array, concept_B: jax.Array, names: Sequence[str]
) -> dict[str, jax.Array]:
    """Returns {"harmful_loss/NAME": mean loss of the batch's pairs of that concept}.

    NaN for a concept of which the batch has no pair. Empty for fewer than two names: it
    would say the batch's mean again.

    Args: concept_B: int32 "B", indices into names.
    """
    if len(names) < 2:
        return {}
    masks = {name: concept_B == i for i, name in enumerate(names)}
    return {
        f"harmful_loss/{name}": jnp.sum(jnp.where(mask, loss_B, 0.0)) / jnp.sum(mask)
        for name, mask in masks.items()
    }


def bounded_ascent(loss_B: jax.Array, bound: str, cap: float) -> jax.Array:
    """Returns the scalar to minimize so that the examples' losses rise.

    Args: loss_B: float32 "B", the loss of each example. bound: raw: -loss, without
      limit; hinge: -min(loss, cap), zero gradient past cap, example by example; log:
      -log(1 + loss), whose gradient fades. cap: in the loss's unit; hinge only.
    Raises: ValueError for an unknown bound.
    Source: raw is IMMA's (arXiv:2311.18815) and MIMA's; log follows RepNoise
      (arXiv:2405.14577); hinge is APDM's relu_bound (arXiv:2511.01307). Ascent plus
      preservation without a bound need not converge (APDM, theorem 1).
    """
    if bound == "raw":
        return -jnp.mean(loss_B)
    if bound == "hinge":
        return -jnp.mean(jnp.minimum(loss_B, cap))
    if bound == "log":
        return -jnp.mean(jnp.log1p(loss_B))
    raise ValueError(f"bound={bound!r} must be one of {', '.join(BOUNDS)}")


def noise_target(
    key: jax.Array, h_BND: jax.Array, kind: str, index_B: jax.Array | None = None
) -> jax.Array:
    """Returns the noise that a layer's hidden states are to resemble, "B N D".

    Args: h_BND: a layer's output: N tokens of width D. kind: standard: N(0, I), as
      RepNoise's code; matched: the layer's own mean and standard deviation over tokens
      and examples, for each channel, no gradient through them. index_B: see
      `normal_like`.
    Raises: ValueError for an unknown kind.
    Source: GIFT (arXiv:2507.13598) leaves the choice open; RepNoise, arXiv:2405.14577.
    """
    noise = normal_like(key, at_least_float32(h_BND), index_B)
    if kind == "standard":
        return noise
    if kind == "matched":
        h = jax.lax.stop_gradient(at_least_float32(h_BND))
        axes = tuple(range(h.ndim - 1))
        mean = jnp.mean(h, axes, keepdims=True)
        return mean + jnp.std(h, axes, keepdims=True) * noise
    raise ValueError(f"noise_target={kind!r} must be one of {', '.join(NOISE_TARGETS)}")


def mmd(x_ND: jax.Array, y_ND: jax.Array) -> jax.Array:
    """Returns the squared maximum mean discrepancy of two samples, a scalar.

    A sum of five Gaussian kernels around the mean squared distance (no gradient
    through it). The tokens are the samples: with one sample a side the value would be
    a constant.
    Source: Gretton et al. 2012, eq. 5 (biased); the kernels are RepNoise's.
    """
    x_ND, y_ND = at_least_float32(x_ND), at_least_float32(y_ND)
    both = jnp.concatenate([x_ND, y_ND])
    square = jnp.sum(jnp.square(both), axis=-1)
    gram = both @ both.T
    distance = jnp.maximum(square[:, None] + square[None, :] - 2.0 * gram, 0.0)
    count = both.shape[0]
    width = jax.lax.stop_gradient(jnp.sum(distance) / (count * (count - 1)))
    powers = 2.0 ** (jnp.arange(MMD_KERNELS) - MMD_KERNELS // 2)
    kernels = (jnp.exp(-distance / (width * p + 1e-12)) for p in powers)
    kernel = sum(kernels, jnp.zeros_like(distance))
    n = x_ND.shape[0]
    within = jnp.mean(kernel[:n, :n]) + jnp.mean(kernel[n:, n:])
    return within - 2.0 * jnp.mean(kernel[:n, n:])


def representation_noising(
    key: jax.Array,
    hiddens: dict,
    target: str,
    distance: str,
    tokens: int = 256,
    index_B: jax.Array | None = None,
) -> jax.Array:
    """Returns the mean over layers of the distance between states and noise, a scalar.

    Args: hiddens: layer name -> "B N D" (or "B H W D"). target: of NOISE_TARGETS.
      distance: mse; or mmd, over at most `tokens` tokens of each example. index_B: see
      `normal_like`.
    Raises: ValueError for an unknown name or no layer.
    Source: GIFT's upper level (arXiv:2507.13598), after RepNoise (arXiv:2405.14577).
    """
    if not hiddens:
        raise ValueError("representation noising needs at least one layer")
    keys = jax.random.split(key, len(hiddens))
    total = jnp.zeros((), jnp.float32)
    for k, name in zip(keys, sorted(hiddens), strict=True):
        h = hiddens[name]
        h_BND = h.reshape(h.shape[0], -1, h.shape[-1])
        n_BND = noise_target(k, h_BND, target, index_B)
        if distance == "mse":
            total += jnp.mean(squared_error(h_BND, n_BND))
        elif distance == "mmd":
            stride = -(-h_BND.shape[1] // tokens)
            h_BND, n_BND = h_BND[:, ::stride], n_BND[:, ::stride]
            total += jnp.mean(jax.vmap(mmd)(h_BND, n_BND))
        else:
            raise ValueError(
                f"distance={distance!r} must be one of {', '.join(DISTANCES)}"
            )
    return total / len(hiddens)
