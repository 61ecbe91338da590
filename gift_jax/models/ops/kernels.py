# SPDX-License-Identifier: Apache-2.0
"""Which version of each heavy operation computes a model's layers."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gift_jax.models.ops import attention, conv, norms

CHOICES = {
    "attention": ("auto", "plain", "chunked", "flash", "cudnn"),
    "conv": ("auto", "xla", "matmul"),
    "norm": ("auto", "xla", "matmul"),
    "remat": ("none", "block", "full"),
}
_FLASH_TOKENS = 1024  # from so many on; at 256 XLA's own moves nearly as few bytes


@dataclasses.dataclass(frozen=True)
class Kernels:
    """How a model computes its layers; hashable, an attribute of its modules.

    The numbers are the same, to rounding, whatever is chosen.

    Attributes:
      attention: plain; chunked, over heads and queries; flash (TPU) or cudnn (GPU, 16
        bits) where they have a kernel; or auto: what suits platform, shape and type.
      conv: xla; matmul, one matrix product; or auto: matmul on CPUs where there are few
        positions for the channels.
      norm: xla; matmul, sums as matrix products; or auto: matmul on CPUs.
      remat: what the backward pass computes again: none; block: resnets and
        transformers from their inputs; full: the UNet's stages, and then their blocks.
      platform: cpu, gpu or tpu, for auto; "": JAX's default backend.
      mesh: where a batch lies that XLA cannot divide by itself; or None.
    """

    attention: str = "auto"
    conv: str = "auto"
    norm: str = "auto"
    remat: str = "none"
    platform: str = ""
    mesh: Mesh | None = None

    def __post_init__(self):
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                value, listed = getattr(self, field), ", ".join(choices)
                raise ValueError(f"{field}={value!r} must be one of {listed}")

    @property
    def device(self) -> str:
        """The platform that is computed for: cpu, gpu or tpu."""
        device = self.platform or jax.default_backend()
        return "gpu" if device == "cuda" else device

    def on(self, mesh: Mesh) -> "Kernels":
        """Returns the same for the devices of a mesh."""
        platform = mesh.devices.flat[0].platform
        return dataclasses.replace(self, mesh=mesh, platform=platform)

    def for_sampling(self, mesh: Mesh | None = None) -> "Kernels":
        """Returns the same for another mesh, or one device, and no backward pass."""
        return dataclasses.replace(self, mesh=mesh, remat="none")

    def twice_differentiable(self) -> "Kernels":
        """Returns the same without kernels that have no second derivative."""
        if self.attention in ("plain", "chunked"):
            return self
        choice = "chunked" if self.device == "cpu" else "plain"
        return dataclasses.replace(self, attention=choice)

    def attend(self, q_BNHD, k_BMHD, v_BMHD):
        """Returns softmax(q k' / sqrt(D)) v, "B N H D" in v's type."""
        choice = self.attention_for(q_BNHD, k_BMHD)
        if choice == "flash":
            interpret = self.device == "cpu"
            return attention.flash_attention(
                q_BNHD, k_BMHD, v_BMHD, self.mesh, interpret
            )
        if choice == "cudnn":
            return attention.cudnn_attention(q_BNHD, k_BMHD, v_BMHD)
        if choice == "chunked":
            return attention.chunked_attention(q_BNHD, k_BMHD, v_BMHD, self.mesh)
        return attention.attention_reference(q_BNHD, k_BMHD, v_BMHD)

    def attention_for(self, q, k) -> str:
        """Returns the choice for queries "B N H D" and keys "B M H D".

        Plain wherever flash or cudnn, asked for or not, have no kernel.
        """
        (_, N, _, D), M = q.shape, k.shape[1]
        choice, is_auto = self.attention, self.attention == "auto"
        if is_auto:
            by_device = {"tpu": "flash", "gpu": "cudnn", "cpu": "chunked"}
            choice = by_device.get(self.device, "plain")
        if choice == "flash":
            least = _FLASH_TOKENS if is_auto else attention.LANES
            small_blocks = N % attention.LANES == 0 and N % attention.FLASH_BLOCK
            has_kernel = N == M and least <= N and not (is_auto and small_blocks)
        elif choice == "cudnn":
            # of 77 keys for more queries JAX refuses the gradient
            even = N == M or (N % 2 == 0 and M % 2 == 0)
            has_kernel = even and q.dtype.itemsize == 2 and D % 8 == 0 and D <= 128
        else:
            has_kernel = True
        return choice if has_kernel else "plain"

    def group_norm(self, x, scale_C, bias_C, groups: int, eps: float):
        """Returns float32 x "B ... C", normalized over all but B and scaled."""
        x_BNC = x.reshape(x.shape[0], -1, x.shape[-1])
        function = self._norm(norms.group_norm, norms.group_norm_reference)
        return function(x_BNC, scale_C, bias_C, groups, eps).reshape(x.shape)

    def layer_norm(self, x, scale_C, bias_C, eps: float):
        """Returns float32 x "... C", normalized over its last axis and scaled."""
        x_NC = x.reshape(-1, x.shape[-1])
        function = self._norm(norms.layer_norm, norms.layer_norm_reference)
        return function(x_NC, scale_C, bias_C, eps).reshape(x.shape)

    def _norm(self, by_products, reference) -> Callable[..., jax.Array]:
        """Returns the one of two norms that is quicker here."""
        auto = "matmul" if self.device == "cpu" else "xla"
        choice = auto if self.norm == "auto" else self.norm
        return by_products if choice == "matmul" else reference

    def convolve(self, x_BHWC, kernel: jnp.ndarray, stride: int, padding):
        """Returns a convolution, "B H W C"; see `conv.conv_reference`."""
        product = self.conv == "matmul"
        if self.conv == "auto" and self.device == "cpu":
            product = conv.use_product(x_BHWC.shape, kernel.shape, stride)
        function = conv.conv_as_product if product else conv.conv_reference
        return function(x_BHWC, kernel, stride, padding)
