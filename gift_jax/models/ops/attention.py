# SPDX-License-Identifier: Apache-2.0
"""Attention as defined, and what is faster or smaller on CPUs, GPUs and TPUs.

Axes: B batch, N queries, M keys, H heads, D a head's size. Scores are float32.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

_WHOLE_SCORES_BYTES = 8 * 2**20  # up to which all scores are computed at once on CPUs
_CHUNK_SCORES_BYTES = 8 * 2**20  # of one head and chunk of queries
FLASH_BLOCK = 512
_FLASH_SUMS_BYTES = 256 * 2**20  # of what flash attention takes for part of a batch
LANES = 128  # of a TPU

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def attention_reference(q_BNHD, k_BMHD, v_BMHD, *, causal: bool = False):
    """Returns softmax(q k' / sqrt(D)) v, "B N H D" in v's type.

    Args: causal: whether a query sees only the keys up to its own position.

    Source: Vaswani et al. 2017, eq. 1; as diffusers' `AttnProcessor` computes it.
    """
    scores = _product("bnhd,bmhd->bhnm", q_BNHD, k_BMHD) * q_BNHD.shape[-1] ** -0.5
    if causal:
        visible = jnp.tril(jnp.ones(scores.shape[2:], bool))[None, None]
        scores = jnp.where(visible, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bhnm,bmhd->bnhd", weights.astype(v_BMHD.dtype), v_BMHD)


def num_chunks(length: int, size: float, limit: float) -> int:
    """Returns the least number of equal chunks of at most `limit`; `length` at most.

    Args: length: what is divided. size: of the whole, in the unit of `limit`.
    """
    least = min(length, math.ceil(size / limit))
    return next(n for n in range(least, length + 1) if length % n == 0)


def chunked_attention(q_BNHD, k_BMHD, v_BMHD, mesh: Mesh | None = None):
    """Returns what `attention_reference` returns, one head after the other.

    For CPUs: the scores of one head, of some of its queries at a time, stay in the
    cache. On the way back they are computed again. Forward and backward for 4,096
    tokens and 8 heads of 40 channels: 0.7 s instead of 1.3 s on two busy cores
    (`python perf/layers.py --parts attention`).
    """
    B, N, H, _ = q_BNHD.shape
    if B * H * N * k_BMHD.shape[1] * 4 <= _WHOLE_SCORES_BYTES:
        return attention_reference(q_BNHD, k_BMHD, v_BMHD)
    attend = _per_device(_chunked, mesh, B, H)
    return attend(q_BNHD, k_BMHD, v_BMHD)


def _chunked(q_BNHD, k_BMHD, v_BMHD):
    (B, N, H, D), M = q_BNHD.shape, k_BMHD.shape[1]
    chunks = num_chunks(N, N * M * 4, _CHUNK_SCORES_BYTES)
    q = jnp.transpose(q_BNHD, (0, 2, 1, 3)).reshape(B * H, chunks, N // chunks, D)
    # with keys last, of the values too, the gradients' products are in a fast order
    k, v = (
        jnp.transpose(a, (0, 2, 3, 1)).reshape(B * H, D, M) for a in (k_BMHD, v_BMHD)
    )

    def one_head(arrays):
        q_cnD, *keys_values = arrays
        # whose gradients are summed over chunks, in float32
        keys_values = [a_DM.astype(jnp.float32) for a_DM in keys_values]

        @jax.checkpoint
        def one_chunk(q_nD):
            k_DM, v_DM = (a_DM.astype(q_nD.dtype) for a_DM in keys_values)
            scores = _product("nd,dm->nm", q_nD, k_DM) * D**-0.5
            weights = jax.nn.softmax(scores, axis=-1).astype(v_DM.dtype)
            return jnp.einsum("nm,dm->nd", weights, v_DM)

        return jax.lax.map(one_chunk, q_cnD)

    out = jax.lax.map(one_head, (q, k, v))
    return jnp.transpose(out.reshape(B, H, N, D), (0, 2, 1, 3))


def flash_attention(
    q_BNHD, k_BNHD, v_BNHD, mesh: Mesh | None = None, interpret: bool = False
):
    """Returns what `attention_reference` returns; of N scores for N keys, for TPUs.

    It keeps no scores: a step of Stable Diffusion 1.5 at 64x64 latents accesses 46 GB
    instead of 105 (`python -m gift_jax.compile --step unet`). An N that does not divide
    by `LANES` is padded to blocks: 4,429 tokens of image and text to 4,608. Args:
    interpret: to run on CPUs.
    """
    B, N, H, _ = q_BNHD.shape
    multiple = LANES if N % LANES == 0 or N < FLASH_BLOCK else FLASH_BLOCK
    qkv = _padded(multiple, q_BNHD, k_BNHD, v_BNHD)
    attend = functools.partial(_flash, tokens=N, interpret=interpret)
    return _per_device(attend, mesh, B, H)(*qkv)[:, :N]


def _padded(multiple: int, *arrays):
    """Returns arrays "B N ..." with zeros after N, up to a multiple."""
    rows = -arrays[0].shape[1] % multiple
    if not rows:
        return arrays
    return tuple(
        jnp.pad(a, [(0, 0), (0, rows)] + [(0, 0)] * (a.ndim - 2)) for a in arrays
    )


def _flash(q_BNHD, k_BNHD, v_BNHD, *, tokens: int, interpret: bool):
    """Args: tokens: of N, those that are no padding."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    B, N, H, D = q_BNHD.shape
    fields = {field.name for field in dataclasses.fields(splash.BlockSizes)}
    blocks = {name for name in fields if name.startswith("block_")}
    sizes = dict.fromkeys(blocks, math.gcd(FLASH_BLOCK, N))
    # with tokens last, a head of 40 or 80 is not padded to a TPU's 128 lanes
    layouts: dict[str, Any] = dict.fromkeys(fields - blocks, splash.QKVLayout.SEQ_MINOR)
    layouts["use_fused_bwd_kernel"] = False
    attend_example = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.FullMask((N, N))] * H),
        block_sizes=splash.BlockSizes(**sizes, **layouts),
        interpret=interpret,
    )
    if tokens < N:  # padding is a segment of its own, to which no token attends
        segment_N = (jnp.arange(N) >= tokens).astype(jnp.int32)
        segments = splash.SegmentIds(segment_N, segment_N)
        attend_example = functools.partial(attend_example, segment_ids=segments)
    q = q_BNHD * q_BNHD.dtype.type(D**-0.5)
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k_BNHD, v_BNHD))
    # the kernel writes each row's sum over all lanes, which are then thrown away
    chunks = num_chunks(B, B * H * N * LANES * 4, _FLASH_SUMS_BYTES)
    parts = zip(*(jnp.split(a, chunks) for a in (q, k, v)), strict=True)
    outputs = map_sequential(jax.vmap(attend_example), parts)
    return jnp.swapaxes(jnp.concatenate(outputs), 1, 2)


def cudnn_attention(q_BNHD, k_BMHD, v_BMHD):
    """Returns what `attention_reference` returns; for GPUs and 16-bit types.

    Queries and keys of the same odd number get one of zeros more, which is masked: of
    an odd number JAX refuses the gradient.
    """
    B, N, M = len(q_BNHD), q_BNHD.shape[1], k_BMHD.shape[1]
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    if N != M or N % 2 == 0:
        return attend(q_BNHD, k_BMHD, v_BMHD)
    length_B = jnp.full((B,), N, jnp.int32)
    lengths = {"query_seq_lengths": length_B, "key_value_seq_lengths": length_B}
    return attend(*_padded(2, q_BNHD, k_BMHD, v_BMHD), **lengths)[:, :N]


def map_sequential(function, parts) -> list:
    """Returns function(*part) of each part, none begun before the last is done.

    Where XLA would compute all at once, with the memory of all.
    """
    outputs = []
    for part in parts:
        if outputs:
            part, outputs[-1] = jax.lax.optimization_barrier((part, outputs[-1]))
        outputs.append(function(*part))
    return outputs


def _per_device(attend, mesh: Mesh | None, batch: int, heads: int):
    """Returns `attend` for the part of batch and heads that a device has.

    Neither kernels nor loops over heads can be divided by XLA itself.
    """
    if mesh is None or mesh.size == 1:
        return attend
    whole = batch % (mesh.shape["data"] * mesh.shape["fsdp"])
    data = None if whole else ("data", "fsdp")
    tensor = "tensor" if heads % mesh.shape["tensor"] == 0 else None
    spec = PartitionSpec(data, None, tensor)
    return jax.shard_map(
        attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
    )
