# SPDX-License-Identifier: Apache-2.0
"""What a compiled program computes, moves and sends, by the compiler's account."""

import dataclasses
import math
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU chip: bytes of memory, bfloat16 FLOP/s, bytes/s of memory."""

    memory: float
    flops: float
    bandwidth: float


_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4}
_SIZES |= {"u32": 4, "f64": 8, "s64": 8, "u64": 8, "s16": 2, "u16": 2}
_COLLECTIVES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
_COLLECTIVE = re.compile(rf" = (\(.*?\)|\S+) ({_COLLECTIVES})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_ATTENTION = re.compile(r"%splash_mha_(fwd|dq|dkv)\S* = \((.*?)\) custom-call\(")
_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # matrix products of those kernels


def account(compiled, chip: Chip) -> dict[str, Any]:
    """Returns memory, work and collectives of a compiled program, all of one chip."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    hlo = compiled.as_text()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    flops = cost["flops"] + attention_flops(hlo)
    moved = cost["bytes accessed"]
    compute_s, memory_s = flops / chip.flops, moved / chip.bandwidth
    roofline_s = max(compute_s, memory_s)
    return {
        "hbm_bytes": parts | {"used": sum(parts.values()), "capacity": chip.memory},
        "flops": flops,
        "bytes_accessed": moved,
        "flops_per_byte": round(flops / moved, 2),
        "roofline_ms": round(1e3 * roofline_s, 3),
        "compute_fraction": round(compute_s / roofline_s, 3),
        "limited_by": "compute" if compute_s >= memory_s else "memory",
        "collectives": collectives(hlo),
    }


def attention_flops(hlo: str) -> int:
    """Returns FLOP of a compiled program's attention kernels, which XLA leaves out."""
    total = 0
    for kind, results in _ATTENTION.findall(hlo):
        shapes = [sizes.split(",") for _, sizes in _SHAPE.findall(results)]
        *batch, N, D = map(int, max(shapes, key=len))  # the first of those with "B H"
        total += _PRODUCTS[kind] * 2 * math.prod(batch) * N * N * D
    return total


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Returns {kind: {count, bytes}} of a compiled program's text; bytes of results."""
    totals: dict[str, dict[str, int]] = {}
    for shape, kind, is_start in _COLLECTIVE.findall(hlo):
        results = [_bytes(*result) for result in _SHAPE.findall(shape)]
        if is_start and kind != "all-reduce":  # (what goes in, what comes out, ...)
            results = [max(results)]
        total = totals.setdefault(kind, {"count": 0, "bytes": 0})
        total["count"] += 1
        total["bytes"] += sum(results)
    return totals


def _bytes(dtype: str, sizes: str) -> int:
    return _SIZES.get(dtype, 4) * math.prod(int(n) for n in sizes.split(",") if n)
