# SPDX-License-Identifier: Apache-2.0
"""The Flax modules that models are built of beside `flax.linen.Dense`."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from gift_jax.models.ops.kernels import Kernels


class Conv(nn.Module):
    """2D convolution of "B H W C" by a square kernel.

    Attributes: features: C of the result. padding: on each side, or ((before, after),
      (before, after)).
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: int | tuple = 0
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BHWC):
        shape = (self.size, self.size, x_BHWC.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        padding = self.padding
        if isinstance(padding, int):
            padding = ((padding, padding),) * 2
        x, kernel = x_BHWC.astype(self.dtype), kernel.astype(self.dtype)
        y = self.kernels.convolve(x, kernel, self.stride, padding)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(self.dtype).reshape(1, 1, 1, -1)
        return y


class GroupNorm(nn.Module):
    """Group normalization of "B ... C", computed in float32.

    Attributes: dtype: of the result.
    """

    groups: int
    eps: float
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x):
        scale, bias = _scale_and_bias(self, x.shape[-1])
        x = x.astype(jnp.float32)
        y = self.kernels.group_norm(x, scale, bias, self.groups, self.eps)
        return y.astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer normalization of "... C", computed in float32.

    Attributes: dtype: of the result.
    """

    eps: float = 1e-5
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x):
        scale, bias = _scale_and_bias(self, x.shape[-1])
        y = self.kernels.layer_norm(x.astype(jnp.float32), scale, bias, self.eps)
        return y.astype(self.dtype)


def _scale_and_bias(module, channels):
    scale = module.param("scale", nn.initializers.ones, (channels,))
    bias = module.param("bias", nn.initializers.zeros, (channels,))
    return scale.astype(jnp.float32), bias.astype(jnp.float32)


class Chain(nn.Module):
    """Modules one after the other.

    Attributes: builders: a function `build(name=...)` of each. names: numbers, if ().
    """

    builders: tuple[Callable[..., nn.Module], ...]
    names: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x):
        names = self.names or map(str, range(len(self.builders)))
        for build, name in zip(self.builders, names, strict=True):
            x = build(name=name)(x)
        return x
