# SPDX-License-Identifier: Apache-2.0
"""Activation functions by the names that config.json files give them."""

import functools

import jax


def gelu(x):
    """Returns x times the normal distribution function of x, not approximated.

    Written with erf, as PyTorch computes it: erfc, which `jax.nn.gelu` uses, takes a
    CPU three times as long.

    Source: Hendrycks and Gimpel 2016 (arXiv:1606.08415).
    """
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def quick_gelu(x):
    """Returns x sigmoid(1.702 x), with which OpenAI's CLIP was trained."""
    return x * jax.nn.sigmoid(1.702 * x)


_tanh_gelu = functools.partial(jax.nn.gelu, approximate=True)

ACTIVATIONS = {  # transformers' names
    "gelu": gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jax.numpy.tanh,
}
