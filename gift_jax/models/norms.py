# SPDX-License-Identifier: Apache-2.0
"""Group and layer normalisation, fast on CPUs: sums are matrix products.

XLA's own sums, of parts of several axes or of products that it computes on the way,
take a CPU up to ten times as long. Gradients are written out, so that they share their
sums; they may be differentiated again.

All is float32. The variance is the mean of (x - mean)^2 (PyTorch's `group_norm` and
`layer_norm`). Axes: B batch, N positions, C channels, G groups.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def group_norm(x_BNC, scale_C, bias_C, groups: int, eps: float):
    """Returns x normalised over positions and a group's channels, scaled, "B N C".

    Source: Wu and He 2018 (arXiv:1803.08494), eqs. 1, 2, 6 and 7.
    """
    return _group_norm_forward(x_BNC, scale_C, bias_C, groups, eps)[0]


def _group_norm_forward(x_BNC, scale_C, bias_C, groups, eps):
    mean_B1C = _group_mean(_mean_of_positions(x_BNC), groups)
    centred = x_BNC - mean_B1C
    variance_B1C = _group_mean(_mean_of_positions(jnp.square(centred)), groups)
    rstd_B1C = jax.lax.rsqrt(variance_B1C + eps)
    y_BNC = centred * (rstd_B1C * _row(scale_C, 3)) + _row(bias_C, 3)
    return y_BNC, (x_BNC, mean_B1C, rstd_B1C, scale_C)


def _group_norm_backward(groups, eps, kept, grad_BNC):
    x_BNC, mean_B1C, rstd_B1C, scale_C = kept
    centred = x_BNC - mean_B1C
    of_bias_BC = _mean_of_positions(grad_BNC)
    of_scale_BC = _mean_of_positions(grad_BNC * centred) * rstd_B1C[:, 0]
    shift_B1C = _group_mean(_row(scale_C, 2) * of_bias_BC, groups)
    slope_B1C = _group_mean(_row(scale_C, 2) * of_scale_BC, groups) * rstd_B1C
    scaled = _row(scale_C, 3) * grad_BNC
    of_x_BNC = rstd_B1C * (scaled - shift_B1C - centred * slope_B1C)
    N = x_BNC.shape[1]
    return of_x_BNC, N * jnp.sum(of_scale_BC, 0), N * jnp.sum(of_bias_BC, 0)


group_norm.defvjp(_group_norm_forward, _group_norm_backward)


def _mean_of_positions(a_BNC):
    """Returns "B C"."""
    B, N, _ = a_BNC.shape
    return jnp.einsum("bn,bnc->bc", jnp.full((B, N), 1 / N, a_BNC.dtype), a_BNC)


def _group_mean(a_BC, groups):
    """Returns the mean of each channel's group, "B 1 C"."""
    C = a_BC.shape[1]
    # a product too, or XLA would look each element's group up wherever it is needed
    member_GC = np.repeat(np.eye(groups, dtype=np.float32), C // groups, axis=1)
    mean_BG = a_BC @ member_GC.T * (groups / C)
    return (mean_BG @ member_GC)[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x_NC, scale_C, bias_C, eps: float):
    """Returns x normalised over channels, scaled, "N C".

    Source: Ba et al. 2016 (arXiv:1607.06450), eq. 4.
    """
    return _layer_norm_forward(x_NC, scale_C, bias_C, eps)[0]


def _layer_norm_forward(x_NC, scale_C, bias_C, eps):
    mean_N1 = _mean_of_channels(x_NC)
    centred = x_NC - mean_N1
    rstd_N1 = jax.lax.rsqrt(_mean_of_channels(jnp.square(centred)) + eps)
    y_NC = centred * rstd_N1 * _row(scale_C, 2) + _row(bias_C, 2)
    return y_NC, (x_NC, mean_N1, rstd_N1, scale_C)


def _layer_norm_backward(eps, kept, grad_NC):
    x_NC, mean_N1, rstd_N1, scale_C = kept
    normal = (x_NC - mean_N1) * rstd_N1
    scaled = grad_NC * _row(scale_C, 2)
    shift_N1, slope_N1 = _mean_of_channels(scaled), _mean_of_channels(scaled * normal)
    of_x_NC = rstd_N1 * (scaled - shift_N1 - normal * slope_N1)
    ones_N = jnp.ones(len(x_NC), x_NC.dtype)
    return of_x_NC, ones_N @ (grad_NC * normal), ones_N @ grad_NC


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _mean_of_channels(a_NC):
    """Returns "N 1"."""
    C = a_NC.shape[1]
    return a_NC @ jnp.full((C, 1), 1 / C, a_NC.dtype)


def _row(a_C, ndim: int):
    return a_C.reshape((1,) * (ndim - 1) + (-1,))
