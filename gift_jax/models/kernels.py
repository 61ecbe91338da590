# SPDX-License-Identifier: Apache-2.0
"""How the heavy layers are computed: the same numbers, for each kind of device.

Axes: B batch, N queries, M keys, H heads, D a head's size, C channels.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

CHOICES = {
    "attention": ("auto", "plain", "chunked", "flash", "cudnn"),
    "conv": ("auto", "xla", "matmul"),
    "norm": ("auto", "xla", "matmul"),
    "remat": ("none", "block", "full"),
}
_CONV_POSITIONS = 16  # that a convolution makes of an image: XLA's is slow with fewer,
_CONV_ROWS = 2  # or fewer of all examples than so many a channel (cpu_layers.py)
_MAX_SCORES_BYTES = 32 * 2**20  # of a part, on CPUs; to a quarter, plain
_SUMMED_KEYS = 1024  # from so many on, on CPUs, weights are summed by their product
_FLASH_TOKENS = 1024  # from so many on; at 256 XLA's own moves nearly as few bytes
_FLASH_BLOCK = 512
_TURN_TOKENS = 1024  # of a part, of what is computed in turn
_MAX_SUMS_BYTES = 256 * 2**20  # of what flash takes up for some examples of a batch
_LANES = 128  # of a TPU


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Which of several ways to compute a model's layers; hashable.

    Attributes:
      attention: plain; chunked, over queries; flash (TPU) or cudnn (GPU, 16 bits) where
        they have a kernel; or auto: what suits the platform, the shape and the type.
      conv: xla; matmul, unfold and one matrix product; or auto: matmul on CPUs where
        there are few positions for the channels.
      norm: xla; matmul, sums as matrix products; or auto: matmul on CPUs.
      remat: what the backward pass computes again: none; block: resnets and
        transformers, from their inputs, one at a time, and of large images what treats
        tokens alike for some of them at a time; full: the UNet's stages and then their
        blocks.
      platform: cpu, gpu or tpu, for auto; "": JAX's default backend.
      mesh: where a batch lies that XLA cannot divide by itself (flash); or None.
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
            apart = self.mesh is None or self.mesh.size == 1
            return _chunked(q_BNHD, k_BMHD, v_BMHD, apart)
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

    def gelu(self, x):
        """Returns x times the normal distribution function of x, not approximated.

        Source: Hendrycks and Gimpel 2016 (arXiv:1606.08415), as PyTorch computes it.
        """
        if self.device != "cpu":
            return jax.nn.gelu(x, approximate=False)
        # erfc, of which that is made, takes CPUs three times as long
        return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))

    @property
    def sums_by_matmul(self) -> bool:
        """Says whether the sums of norms are to be matrix products."""
        if self.norm != "auto":
            return self.norm == "matmul"
        return self.device == "cpu"

    def takes_matmul(self, shape, kernel, stride) -> bool:
        """Says whether a convolution is to be one matrix product.

        Args: shape: of the image, "B H W C". kernel: "h w C_in C_out". stride: (height,
          width).
        """
        if self.conv != "auto":
            return self.conv == "matmul"
        made = math.prod(shape[1:3]) // math.prod(stride)
        few = made < _CONV_POSITIONS or shape[0] * made < _CONV_ROWS * kernel[3]
        apart = kernel[:2] == stride  # nothing is unfolded
        return self.device == "cpu" and (few or apart)


# --- attention ------------------------------------------------------------------------


def _plain(q_BNHD, k_BMHD, v_BMHD):
    scores = _product("bnhd,bmhd->bhnm", q_BNHD, k_BMHD)
    weights = jax.nn.softmax(scores * q_BNHD.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("bhnm,bmhd->bnhd", weights.astype(v_BMHD.dtype), v_BMHD)


def _chunked(q_BNHD, k_BMHD, v_BMHD, apart: bool):
    """The same, in parts where the scores are many."""
    if _scores_bytes(q_BNHD, k_BMHD) <= _MAX_SCORES_BYTES // 4:
        return _plain(q_BNHD, k_BMHD, v_BMHD)
    return _in_parts(apart, q_BNHD, k_BMHD, v_BMHD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_parts(apart, q_BNHD, k_BMHD, v_BMHD):
    """The same for some heads and queries at a time; backwards, computed once more.

    Args: apart: whether heads may go apart. The fewer, the more queries fit in a part,
      and for each of them the product puts the keys in order anew.

    Source: Dao et al. 2022 (arXiv:2205.14135), algorithms 2 and 4 without their loops
    over keys.
    """
    return _in_parts_forward(apart, q_BNHD, k_BMHD, v_BMHD)[0]


def _in_parts_forward(apart, q_BNHD, k_BMHD, v_BMHD):
    heads, queries = _counts(apart, q_BNHD, k_BMHD)
    on_queries, on_scores = _scales(q_BNHD)
    in_float32 = v_BMHD.dtype == jnp.float32
    summed = in_float32 and v_BMHD.shape[1] >= _SUMMED_KEYS

    def some_heads(given):
        q_nBhND, k_BhDM, v_BhDM = given
        if summed:
            ones = jnp.ones_like(v_BhDM[:, :, :1])
            v_BhDM = jnp.concatenate([v_BhDM, ones], axis=2)

        @jax.checkpoint  # for a second derivative
        def part(q_BhnD):
            scores = on_scores * _product("bhnd,bhdm->bhnm", q_BhnD, k_BhDM)
            most = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - most)
            if not summed:
                total = jnp.sum(weights, axis=-1, keepdims=True)
            if not in_float32:
                weights = weights / total  # before they are rounded, as `_plain` does
            out = _product("bhnm,bhdm->bhnd", weights.astype(v_BhDM.dtype), v_BhDM)
            if summed:
                out, total = out[..., :-1], out[..., -1:]
            if in_float32:
                out = out / total  # less work than dividing the weights
            return out.astype(v_BhDM.dtype), most + jnp.log(total)

        return jax.lax.map(part, q_nBhND)

    q_BNHD = on_queries * q_BNHD
    keys, values = (_by_heads(a, heads) for a in (k_BMHD, v_BMHD))
    given = _by_queries(q_BNHD, heads, queries), keys, values
    out, log_total = jax.lax.map(some_heads, given)
    out_BNHD = _of_queries(out)
    return out_BNHD, (q_BNHD, k_BMHD, v_BMHD, out_BNHD, log_total)


def _in_parts_backward(apart, kept, grad_BNHD):
    q_BNHD, k_BMHD, v_BMHD, out_BNHD, log_total = kept
    heads, queries = log_total.shape[:2]
    on_queries, on_scores = _scales(q_BNHD)

    def some_heads(given):
        k_BhDM, v_BhDM, *given = given

        @jax.checkpoint
        def part(sums, given):
            of_k, of_v = sums
            q_BhnD, out_BhnD, grad_BhnD, log_total = given
            scores = on_scores * _product("bhnd,bhdm->bhnm", q_BhnD, k_BhDM)
            weights = jnp.exp(scores - log_total)
            rows = _product("bhnd,bhnd->bhn", grad_BhnD, out_BhnD)[..., None]
            of_weights = _product("bhnd,bhdm->bhnm", grad_BhnD, v_BhDM)
            of_scores = on_scores * weights * (of_weights - rows)
            of_scores = of_scores.astype(q_BhnD.dtype)
            weights = weights.astype(v_BhDM.dtype)
            of_q = _product("bhnm,bhdm->bhnd", of_scores, k_BhDM).astype(q_BhnD.dtype)
            # this order is three times as fast as "bhnm,bhnd->bhmd" on CPUs
            of_k = of_k + _product("bhnd,bhnm->bhdm", q_BhnD, of_scores)
            of_v = of_v + _product("bhnd,bhnm->bhdm", grad_BhnD, weights)
            return (of_k, of_v), of_q

        nothing = tuple(jnp.zeros(a.shape, jnp.float32) for a in (k_BhDM, v_BhDM))
        return jax.lax.scan(part, nothing, tuple(given))

    given = [_by_heads(a, heads) for a in (k_BMHD, v_BMHD)]
    given += [_by_queries(a, heads, queries) for a in (q_BNHD, out_BNHD, grad_BNHD)]
    (of_k, of_v), of_q = jax.lax.map(some_heads, (*given, log_total))
    of_q = on_queries * _of_queries(of_q)
    of_k, of_v = _of_heads(of_k), _of_heads(of_v)
    return of_q, of_k.astype(k_BMHD.dtype), of_v.astype(v_BMHD.dtype)


_in_parts.defvjp(_in_parts_forward, _in_parts_backward)


def _scales(q) -> tuple[float, float]:
    """Returns by what the queries, and by what their scores are to be multiplied.

    Queries are fewer, but those in 16 bits would be rounded.
    """
    scale = q.shape[-1] ** -0.5
    return (scale, 1.0) if q.dtype == jnp.float32 else (1.0, scale)


def _counts(apart: bool, q_BNHD, k_BMHD) -> tuple[int, int]:
    """Returns in how many parts of equal size the heads go, and each one's queries."""
    N, H = q_BNHD.shape[1:3]
    whole = _scores_bytes(q_BNHD, k_BMHD)
    heads = _count(H, whole, _MAX_SCORES_BYTES) if apart else 1
    return heads, _count(N, whole // heads, _MAX_SCORES_BYTES)


def _count(of: int, whole: int, limit: int) -> int:
    """Returns in how many equal parts `of` go so that none has more than its limit.

    Args: whole: what all of them together have. Where even one has too much: all.
    """
    least = min(of, math.ceil(whole / limit))
    return next(n for n in range(least, of + 1) if of % n == 0)


def _scores_bytes(q_BNHD, k_BMHD) -> int:
    (B, N, H, _), M = q_BNHD.shape, k_BMHD.shape[1]
    return B * H * N * M * 4


def _by_heads(a_BMHD, heads: int):
    """Returns parts "heads B h D M"."""
    B, M, H, D = a_BMHD.shape
    a = a_BMHD.reshape(B, M, heads, H // heads, D)
    return jnp.transpose(a, (2, 0, 3, 4, 1))


def _of_heads(parts):
    """Returns "B M H D" of parts "heads B h D M"."""
    heads, B, h, D, M = parts.shape
    return jnp.transpose(parts, (1, 4, 0, 2, 3)).reshape(B, M, heads * h, D)


def _by_queries(a_BNHD, heads: int, queries: int):
    """Returns parts "heads queries B h n D"."""
    B, N, H, D = a_BNHD.shape
    a = a_BNHD.reshape(B, queries, N // queries, heads, H // heads, D)
    return jnp.transpose(a, (3, 1, 0, 4, 2, 5))


def _of_queries(parts):
    """Returns "B N H D" of parts "heads queries B h n D"."""
    heads, queries, B, h, n, D = parts.shape
    parts = jnp.transpose(parts, (2, 1, 4, 0, 3, 5))
    return parts.reshape(B, queries * n, heads * h, D)


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


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
        # the kernel writes each row's sum over all lanes, which are then thrown away
        count = _count(len(q), len(q) * H * N * _LANES * 4, _MAX_SUMS_BYTES)
        parts = zip(*(jnp.split(a, count) for a in (q, k, v)), strict=True)
        out = jnp.concatenate(_one_by_one(jax.vmap(attend_one), parts))
        return jnp.swapaxes(out, 1, 2)

    if mesh is None or mesh.size == 1:
        return attend_shard(q_BNHD, k_BMHD, v_BMHD)
    heads = q_BNHD.shape[2]
    tensor = "tensor" if heads % mesh.shape["tensor"] == 0 else None
    spec = PartitionSpec(("data", "fsdp"), None, tensor)
    attend_shard = jax.shard_map(
        attend_shard, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
    )
    return attend_shard(q_BNHD, k_BMHD, v_BMHD)


# --- in turn --------------------------------------------------------------------------


def parts_of(tokens: int) -> int:
    """Returns in how many parts of equal size, of at most 1,024, tokens go."""
    return _count(tokens, tokens, _TURN_TOKENS)


def in_turn(compute, params, x_BNC):
    """Returns compute(params, x), for one part of the tokens after the other.

    So in memory is one part, also on the way back: x alone is kept, and a part computed
    again when the gradient of the part before it is there.

    Args: compute: of a part of x, what it would make of it as part of the whole.
      params: any tree of floating-point arrays.
    """
    count = parts_of(x_BNC.shape[1])
    example = x_BNC[:, : x_BNC.shape[1] // count]
    # on the way back the caller's contexts are left, so it is traced here
    traced, others = jax.closure_convert(compute, params, example)

    def compute_part(given, part):
        params, *others = given
        return traced(params, part, *others)

    return _in_turn(compute_part, count, (params, *others), x_BNC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_turn(compute, count, given, x_BNC):
    parts = zip(jnp.split(x_BNC, count, axis=1), strict=True)
    made = _one_by_one(functools.partial(compute, given), parts)
    return jnp.concatenate(made, axis=1)


def _in_turn_forward(compute, count, given, x_BNC):
    return _in_turn(compute, count, given, x_BNC), (given, x_BNC)


def _in_turn_backward(compute, count, kept, grad_BNC):
    given, x_BNC = kept
    of_given = jax.tree.map(jnp.zeros_like, given)

    def of_x(part, grad):
        nonlocal of_given  # not returned: what nobody asks for is not computed
        _, back = jax.vjp(compute, given, part)
        of_these, of_part = back(grad)
        of_given = jax.tree.map(jnp.add, of_given, of_these)
        return of_part

    parts = zip(*(jnp.split(a, count, axis=1) for a in (x_BNC, grad_BNC)), strict=True)
    grads = jnp.concatenate(_one_by_one(of_x, parts), axis=1)
    return of_given, grads


def _one_by_one(compute, parts) -> list:
    """Returns compute(*part) of each part, none begun before the one before is done."""
    made = []
    for part in parts:
        if made:
            part, made[-1] = jax.lax.optimization_barrier((part, made[-1]))
        made.append(compute(*part))
    return made


_in_turn.defvjp(_in_turn_forward, _in_turn_backward)


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
