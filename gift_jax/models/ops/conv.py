# SPDX-License-Identifier: Apache-2.0
"""2D convolution: XLA's own, and as one matrix product.

XLA's convolution is slow on CPUs where an image has few positions for its channels. A
step of emoji-sd, whose innermost images are 2x2, takes a third of the time with
`use_product` (38 instead of 120 ms for 4 examples: `python perf/layers.py`).
"""

import math

import jax
import jax.numpy as jnp

_FEW_POSITIONS = 16  # of the result
_ROWS_PER_CHANNEL = 2  # examples x positions of the result, fewer of which are few


def conv_reference(x_BHWC, kernel, stride: int, padding):
    """Returns the convolution, "B H W C".

    Args: kernel: "h w C_in C_out". padding: ((before, after), (before, after)) of
      height and width.
    """
    return jax.lax.conv_general_dilated(
        x_BHWC,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def conv_as_product(x_BHWC, kernel, stride: int, padding):
    """Returns what `conv_reference` returns: shifted slices times one matrix."""
    x, (kh, kw, c_in, c_out) = x_BHWC, kernel.shape
    if padding != ((0, 0), (0, 0)):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    B, H, W, _ = x.shape
    oh, ow = (H - kh) // stride + 1, (W - kw) // stride + 1
    if kh == kw == stride > 1:  # patches that do not overlap
        x = x[:, : oh * kh, : ow * kw].reshape(B, oh, kh, ow, kw, c_in)
        columns = jnp.transpose(x, (0, 1, 3, 2, 4, 5))
    else:
        rows = [slice(i, i + stride * (oh - 1) + 1, stride) for i in range(kh)]
        cols = [slice(j, j + stride * (ow - 1) + 1, stride) for j in range(kw)]
        columns = jnp.concatenate([x[:, r, c] for r in rows for c in cols], axis=-1)
    y = columns.reshape(B * oh * ow, kh * kw * c_in) @ kernel.reshape(-1, c_out)
    return y.reshape(B, oh, ow, c_out)


def use_product(image, kernel, stride: int) -> bool:
    """Whether a CPU computes a convolution faster as a product.

    Args: image: the shape "B H W C". kernel: the shape "h w C_in C_out".
    """
    positions = math.prod(image[1:3]) // stride**2
    few = positions < _FEW_POSITIONS
    few |= image[0] * positions < _ROWS_PER_CHANNEL * kernel[3]
    return few or kernel[:2] == (stride, stride)  # where nothing has to be unfolded
