# SPDX-License-Identifier: Apache-2.0
"""How the heavy layers are computed: the same numbers, for each kind of device.

Axes: B batch, N queries, M keys, H heads, D a head's size, C channels.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

CHOICES = {
    "attention": ("auto", "plain", "chunked", "flash", "cudnn"),
    "conv": ("auto", "xla", "matmul"),
    "remat": ("none", "block", "full"),
}
_MAX_COLUMNS_BYTES = 256 * 2**20  # above, an unfolded image costs more than it saves
_MAX_SCORES_BYTES = 32 * 2**20  # above, on CPUs, attention goes in chunks of queries
_FLASH_TOKENS = 1024  # from so many on; at 256 XLA's own moves nearly as few bytes
_FLASH_BLOCK = 512
_LANES = 128  # of a TPU


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Which of several ways to compute a model's layers; hashable.

    Attributes:
      attention: plain; chunked, over queries; flash (TPU) or cudnn (GPU, 16 bits) where
        they have a kernel; or auto: what suits the platform, the shape and the type.
      conv: xla; matmul, unfold and one matrix product; or auto: matmul on CPUs where
        the unfolded image is small.
      remat: what the backward pass computes again: none; block: resnets and
        transformers, from their inputs, one at a time; full: the UNet's stages and then
        their blocks.
      platform: cpu, gpu or tpu, for auto; "": JAX's default backend.
      mesh: where a batch lies that XLA cannot divide by itself (flash); or None.
    """

    attention: str = "auto"
    conv: str = "auto"
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

    def for_drawing(self, mesh: Mesh | None = None) -> "Kernels":
        """Returns the same for another mesh, or one device, and no backward pass."""
        return dataclasses.replace(self, mesh=mesh, remat="none")

    def twice_differentiable(self) -> "Kernels":
        """Returns the same without kernels that have no second derivative."""
        if self.attention in ("plain", "chunked"):
            return self
        attention = "chunked" if self.device == "cpu" else "plain"
        return dataclasses.replace(self, attention=attention)

    def attend(self, q_BNHD, k_BMHD, v_BMHD):
        """Returns softmax(q k' / sqrt(D)) v, "B N H D" in v's type; scores in float32.

        Source: Vaswani et al. 2017, eq. 1; as diffusers' `AttnProcessor` computes it.
        """
        kind = self.attention_for(q_BNHD, k_BMHD)
        if kind == "flash":
            return _flash(q_BNHD, k_BMHD, v_BMHD, self.mesh, self.device == "cpu")
        if kind == "cudnn":
            return jax.nn.dot_product_attention(
                q_BNHD, k_BMHD, v_BMHD, implementation="cudnn"
            )
        if kind == "chunked":
            return _chunked(q_BNHD, k_BMHD, v_BMHD)
        return _plain(q_BNHD, k_BMHD, v_BMHD)

    def attention_for(self, q, k) -> str:
        """Returns the kind for queries "B N H D" and keys "B M H D".

        What flash or cudnn have no kernel for is plain, asked for or not.
        """
        if self.attention in ("plain", "chunked"):
            return self.attention
        (_, N, _, D), M = q.shape, k.shape[1]
        kind = self.attention
        if kind == "auto":
            kind = {"tpu": "flash", "gpu": "cudnn", "cpu": "chunked"}.get(self.device)
        if kind == "flash":
            least, block = _FLASH_TOKENS, _FLASH_BLOCK
            if self.attention != "auto":
                least = block = _LANES
            fits = N == M and N >= least and N % block == 0
        elif kind == "cudnn":
            # of an odd number of rows (77 of text) JAX refuses the gradient
            even = N % 2 == 0 and M % 2 == 0
            fits = even and q.dtype.itemsize == 2 and D % 8 == 0 and D <= 128
        else:
            fits = kind == "chunked"
        return kind if fits else "plain"

    def takes_matmul(self, shape, kernel, stride) -> bool:
        """Says whether a convolution is to be one matrix product.

        Args: shape: of the image, "B H W C". kernel, stride: (height, width).
        """
        if self.conv != "auto":
            return self.conv == "matmul"
        unfolded = math.prod(shape) * math.prod(kernel) // math.prod(stride) * 4
        return self.device == "cpu" and unfolded <= _MAX_COLUMNS_BYTES


# --- attention ------------------------------------------------------------------------


def _plain(q_BNHD, k_BMHD, v_BMHD):
    scores = jnp.einsum(
        "bnhd,bmhd->bhnm", q_BNHD, k_BMHD, preferred_element_type=jnp.float32
    )
    weights = jax.nn.softmax(scores * q_BNHD.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("bhnm,bmhd->bnhd", weights.astype(v_BMHD.dtype), v_BMHD)


def _chunked(q_BNHD, k_BMHD, v_BMHD):
    """The same for a part of the queries at a time, each computed again backwards."""
    (B, N, H, D), M = q_BNHD.shape, k_BMHD.shape[1]
    wanted = min(N, max(1, math.ceil(B * H * N * M * 4 / _MAX_SCORES_BYTES)))
    chunks = next(n for n in range(wanted, N + 1) if N % n == 0)
    if chunks == 1:
        return _plain(q_BNHD, k_BMHD, v_BMHD)
    parts = jnp.moveaxis(q_BNHD.reshape(B, chunks, N // chunks, H, D), 1, 0)
    # what the parts add to the gradient of keys and values is summed in float32
    k, v = k_BMHD.astype(jnp.float32), v_BMHD.astype(jnp.float32)

    @jax.checkpoint
    def part(q):
        return _plain(q, k.astype(k_BMHD.dtype), v.astype(v_BMHD.dtype))

    out = jax.lax.map(part, parts)
    return jnp.moveaxis(out, 0, 1).reshape(B, N, H, D)


def _flash(q_BNHD, k_BMHD, v_BMHD, mesh: Mesh | None, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    def attend_shard(q, k, v):
        N, H, D = q.shape[1:]
        fields = {field.name for field in dataclasses.fields(splash.BlockSizes)}
        blocks = {name for name in fields if name.startswith("block_")}
        sizes = dict.fromkeys(blocks, math.gcd(_FLASH_BLOCK, N))
        # with tokens last, a head of 40 or 80 is not padded to a TPU's 128 lanes
        layouts = dict.fromkeys(fields - blocks, splash.QKVLayout.SEQ_MINOR)
        layouts["use_fused_bwd_kernel"] = False
        everything = masks.MultiHeadMask([masks.FullMask((N, N))] * H)
        attend_one = splash.make_splash_mha_single_device(
            everything,
            block_sizes=splash.BlockSizes(**sizes, **layouts),
            interpret=interpret,
        )
        q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q * q.dtype.type(D**-0.5), k, v))
        return jnp.swapaxes(jax.vmap(attend_one)(q, k, v), 1, 2)

    if mesh is None or mesh.size == 1:
        return attend_shard(q_BNHD, k_BMHD, v_BMHD)
    heads = q_BNHD.shape[2]
    tensor = "tensor" if heads % mesh.shape["tensor"] == 0 else None
    spec = PartitionSpec(("data", "fsdp"), None, tensor)
    attend_shard = jax.shard_map(
        attend_shard, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
    )
    return attend_shard(q_BNHD, k_BMHD, v_BMHD)


# --- convolution ----------------------------------------------------------------------


def conv_as_matmul(x_BHWC, kernel, bias, stride, padding):
    """Returns a convolution as shifted slices times one matrix, "B H W C".

    Args: kernel: "h w C_in C_out". bias: "C_out" or None. padding: ((before, after),
      (before, after)) of height and width.
    """
    x, (kh, kw, c_in, c_out), (sh, sw) = x_BHWC, kernel.shape, stride
    if padding != ((0, 0), (0, 0)):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    B, H, W, _ = x.shape
    oh, ow = (H - kh) // sh + 1, (W - kw) // sw + 1
    if (kh, kw) == (sh, sw) and (kh, kw) != (1, 1):  # patches that do not overlap
        x = x[:, : oh * kh, : ow * kw].reshape(B, oh, kh, ow, kw, c_in)
        columns = jnp.transpose(x, (0, 1, 3, 2, 4, 5))
    else:
        rows = [slice(i, i + sh * (oh - 1) + 1, sh) for i in range(kh)]
        cols = [slice(j, j + sw * (ow - 1) + 1, sw) for j in range(kw)]
        columns = jnp.concatenate([x[:, r, c] for r in rows for c in cols], axis=-1)
    y = columns.reshape(B * oh * ow, kh * kw * c_in) @ kernel.reshape(-1, c_out)
    if bias is not None:
        y = y + bias.reshape(1, c_out)
    return y.reshape(B, oh, ow, c_out)
