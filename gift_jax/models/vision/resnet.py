# SPDX-License-Identifier: Apache-2.0
"""ResNet with a classifier, whose batch norms use their running statistics.

Parameters are named as in transformers, the statistics among them. Axes: B batch, H
height, W width, C channels.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gift_jax.models.ops.activations import ACTIVATIONS
from gift_jax.models.ops.kernels import Kernels
from gift_jax.models.ops.layers import Chain, Conv
from gift_jax.models.params import from_config
from gift_jax.models.vision.vit import num_labels

_EPS = 1e-5
_REDUCTION = 4  # of a bottleneck's inner channels


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """The fields of a ResNet's config.json that change what is computed."""

    num_channels: int = 3
    embedding_size: int = 64
    hidden_sizes: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[int, ...] = (3, 4, 6, 3)
    layer_type: str = "bottleneck"
    hidden_act: str = "relu"
    downsample_in_first_stage: bool = False
    num_labels: int = 2


class BatchNorm(nn.Module):
    """Batch normalization by its running statistics, which are parameters here.

    Source: Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithm 2.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC):
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        starts = {"scale": ones, "bias": zeros, "mean": zeros, "var": ones}
        scale, bias, mean, var = (
            self.param(name, start, x_BHWC.shape[-1:]).reshape(1, 1, 1, -1)
            for name, start in starts.items()
        )
        y = (x_BHWC - mean) * jax.lax.rsqrt(var + _EPS) * scale + bias
        return y.astype(self.dtype)


class ConvLayer(nn.Module):
    """Convolution, batch norm, and an activation or "". Attributes: see `Conv`."""

    features: int
    size: int
    stride: int
    activation: str
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BHWC):
        fields = self.features, self.size, self.stride, self.size // 2, False
        conv = Conv(*fields, self.dtype, self.kernels, name="convolution")
        x_BHWC = BatchNorm(self.dtype, name="normalization")(conv(x_BHWC))
        return ACTIVATIONS[self.activation](x_BHWC) if self.activation else x_BHWC


class Block(nn.Module):
    """Two or, in a bottleneck, three convolutions beside a shortcut."""

    config: ResNetConfig
    features: int
    stride: int
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BHWC):
        act, common = self.config.hidden_act, (self.dtype, self.kernels)
        layers = [  # channels, kernel's size, stride, activation
            (self.features, 3, self.stride, "relu"),
            (self.features, 3, 1, ""),
        ]
        if self.config.layer_type == "bottleneck":
            inner = self.features // _REDUCTION
            layers = [
                (inner, 1, 1, act),
                (inner, 3, self.stride, act),
                (self.features, 1, 1, ""),
            ]
        build = tuple(functools.partial(ConvLayer, *f, *common) for f in layers)
        h_BHWC = Chain(build, name="layer")(x_BHWC)
        if self.stride != 1 or x_BHWC.shape[-1] != self.features:
            fields = self.features, 1, self.stride, ""
            x_BHWC = ConvLayer(*fields, *common, name="shortcut")(x_BHWC)
        return ACTIVATIONS[act](x_BHWC + h_BHWC)


class ResNet(nn.Module):
    """The network without its classifier: "B H W 3" -> "B C", the mean of positions."""

    config: ResNetConfig
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BHWC):
        config, common = self.config, (self.dtype, self.kernels)
        fields = config.embedding_size, 7, 2, config.hidden_act
        stem = functools.partial(ConvLayer, *fields, *common)
        x_BHWC = Chain((stem,), ("embedder",), name="embedder")(x_BHWC)
        x_BHWC = nn.max_pool(x_BHWC, (3, 3), (2, 2), ((1, 1), (1, 1)))
        stages = []
        for i, depth in enumerate(config.depths):
            first = 1 if i == 0 and not config.downsample_in_first_stage else 2
            block = functools.partial(Block, config, config.hidden_sizes[i])
            blocks = tuple(
                functools.partial(block, first if j == 0 else 1, *common)
                for j in range(depth)
            )
            layers = functools.partial(Chain, blocks)
            stages.append(functools.partial(Chain, (layers,), ("layers",)))
        stages = functools.partial(Chain, tuple(stages))
        x_BHWC = Chain((stages,), ("stages",), name="encoder")(x_BHWC)
        return jnp.mean(x_BHWC, axis=(1, 2))


class ResNetClassifier(nn.Module):
    """ResNet with a dense layer: "B H W 3" -> logits "B N"."""

    config: ResNetConfig
    dtype: Any = jnp.float32
    kernels: Kernels = Kernels()

    @nn.compact
    def __call__(self, x_BHWC):
        x_BC = ResNet(self.config, self.dtype, self.kernels, name="resnet")(x_BHWC)
        dense = functools.partial(nn.Dense, self.config.num_labels, dtype=self.dtype)
        return Chain((dense,), ("1",), name="classifier")(x_BC)

    def example_inputs(self):
        return (jnp.zeros((1, 64, 64, self.config.num_channels)),)


def build_resnet_classifier(
    config: dict, dtype=jnp.float32, kernels: Kernels | None = None
) -> ResNetClassifier:
    """Returns the module for a ResNetForImageClassification's `config.json` dict."""
    config = from_config(ResNetConfig, config, num_labels=num_labels(config))
    return ResNetClassifier(config, dtype, kernels or Kernels())


def apply_classifier(classifier, params, x_BCHW):
    """Returns the logits of an image classifier of any architecture, "B N" of N labels.

    Args: x_BCHW: "B 3 H W", normalized.
    """
    return classifier.apply({"params": params}, jnp.transpose(x_BCHW, (0, 2, 3, 1)))
