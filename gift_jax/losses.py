# SPDX-License-Identifier: Apache-2.0
"""The objectives, as pure functions of arrays.

Axes: B batch, C latent channels, H W latent size, L tokens, D text width, T train
timesteps. Sources: DDPM is Ho et al. 2020 (arXiv:2006.11239); v-prediction is
Salimans & Ho 2022 (arXiv:2202.00512); GIFT is arXiv:2507.13598.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def example_keys(key: jax.Array, index_B: jax.Array) -> jax.Array:
    """Returns one key an example, folded with its index in the global batch.

    What is drawn from them does not depend on how a batch is divided over devices.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index_B)


def normal_like(
    key: jax.Array, x: jax.Array, index_B: jax.Array | None = None
) -> jax.Array:
    """Returns N(0, 1) noise of x's shape and dtype, drawn per example (axis 0).

    Args: index_B: the examples' places in the whole batch; by default x is all of it.
    """
    keys = example_keys(key, _places(x.shape[0], index_B))
    return jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(keys)


def timesteps(
    key: jax.Array, batch: int, limit: int, index_B: jax.Array | None = None
) -> jax.Array:
    """Returns int32 "B", uniform over 0 .. limit - 1, drawn per example.

    Args: index_B: see `normal_like`.
    """
    keys = example_keys(key, _places(batch, index_B))
    return jax.vmap(lambda k: jax.random.randint(k, (), 0, limit))(keys)


def _places(batch: int, index_B: jax.Array | None) -> jax.Array:
    return jnp.arange(batch) if index_B is None else index_B


def split(batch, parts: int):
    """Returns a batch "B ..." as parts "P B/P ...", each of every P-th example.

    So all devices that a batch is divided over share in every part: of P neighbours
    each, a part would lie on some of them, and all would compute the whole of it.

    Args: parts: P, must divide the batch.
    """
    return jax.tree.map(
        lambda a: jnp.swapaxes(a.reshape(-1, parts, *a.shape[1:]), 0, 1), batch
    )


def in_parts(grad_fn: Callable, parts: int) -> Callable:
    """Returns (params, frozen, batch, key) -> (gradient, metrics), a part at a time.

    The memory of one part's gradient; of losses that are means over examples the same
    gradient, with the same noise.

    Args: grad_fn: the same of a whole batch. parts: see `split`; the batch's examples
      need their `index` in it.
    """
    if parts == 1:
        return grad_fn

    def grads_in_parts(params, frozen, batch, key):
        def add(total, part):
            grads, metrics = grad_fn(params, frozen, part, key)
            return jax.tree.map(jnp.add, total, grads), metrics

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, metrics = jax.lax.scan(add, zeros, split(batch, parts))
        grads = jax.tree.map(lambda g: g / parts, total)
        return grads, jax.tree.map(jnp.mean, metrics)

    return grads_in_parts


def per_example(values_B: jax.Array, like: jax.Array) -> jax.Array:
    """Reshapes "B" to broadcast against `like`, whose first axis is B."""
    return values_B.reshape(values_B.shape + (1,) * (like.ndim - 1))


def add_noise(z_BCHW: jax.Array, eps_BCHW: jax.Array, abar_B: jax.Array) -> jax.Array:
    """Returns z_t = sqrt(abar) z + sqrt(1 - abar) eps, "B C H W".

    Args: z_BCHW: scaled latents. eps_BCHW: N(0, 1). abar_B: cumulative alpha at each
      example's timestep, in (0, 1].
    Raises: ValueError if z and eps differ in shape.
    Source: Ho et al. 2020, eq. 4.
    """
    if z_BCHW.shape != eps_BCHW.shape:
        raise ValueError(f"latents {z_BCHW.shape} and noise {eps_BCHW.shape} differ")
    abar = per_example(abar_B, z_BCHW)
    return jnp.sqrt(abar) * z_BCHW + jnp.sqrt(1.0 - abar) * eps_BCHW


def target(z_BCHW, eps_BCHW, abar_B, prediction_type: str):
    """Returns what the UNet is to predict: eps, or v = sqrt(abar) eps - sqrt(1-abar) z.

    Raises: ValueError for a prediction type other than epsilon or v_prediction.
    Source: Ho et al. 2020, eq. 14; Salimans & Ho 2022, section 4.
    """
    if prediction_type == "epsilon":
        return eps_BCHW
    if prediction_type == "v_prediction":
        abar = per_example(abar_B, z_BCHW)
        return jnp.sqrt(abar) * eps_BCHW - jnp.sqrt(1.0 - abar) * z_BCHW
    raise ValueError(
        f"prediction_type={prediction_type!r} is not epsilon or v_prediction"
    )


def at_least_float32(x: jax.Array) -> jax.Array:
    """Returns x in float32, or as it is if it is wider."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def squared_error(prediction, wanted):
    """Returns the mean square error of each example, float32 "B"."""
    error = jnp.square(at_least_float32(prediction) - at_least_float32(wanted))
    return jnp.mean(error, axis=tuple(range(1, error.ndim)))


def by_concept(
    loss_B: jax.Array, concept_B: jax.Array, names: Sequence[str]
) -> dict[str, jax.Array]:
    """Returns {"concept/NAME": mean loss of the batch's pairs of that concept}.

    NaN for a concept of which the batch has no pair. Empty for fewer than two names: it
    would say the batch's mean again.

    Args: concept_B: int32 "B", indices into names.
    """
    if len(names) < 2:
        return {}
    masks = {name: concept_B == i for i, name in enumerate(names)}
    return {
        f"concept/{name}": jnp.sum(jnp.where(mask, loss_B, 0.0)) / jnp.sum(mask)
        for name, mask in masks.items()
    }


def global_norm(tree) -> jax.Array:
    """Returns the Euclidean norm over all leaves of a pytree, a scalar."""
    squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros(())))


BOUNDS = ("hinge", "log", "raw")
NOISE_TARGETS = ("standard", "matched")
DISTANCES = ("mse", "mmd")
MMD_KERNELS = 5  # as RepNoise: bandwidths 1/4, 1/2, 1, 2, 4 times the mean distance


def bounded_ascent(loss_B: jax.Array, bound: str, cap: float) -> jax.Array:
    """Returns the scalar to minimise so that the examples' losses rise.

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
    kernel = sum(jnp.exp(-distance / (width * p + 1e-12)) for p in powers)
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
