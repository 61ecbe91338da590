# SPDX-License-Identifier: Apache-2.0
"""XLA's flags for programs that are compiled once and run a few times."""

import importlib.util
import mmap
import pathlib


def flags() -> str:
    """Returns XLA_FLAGS with which compiling for the CPU takes least time.

    MLIR's emitters of fused loops take half of what is left without optimisation, and
    LLVM's work in 32 parts a sixth more than in one. XLA ends a process at a flag that
    it does not know, and older ones do not know all of these, so that its library is
    asked first.
    """
    chosen = ["--xla_backend_optimization_level=0"]
    for name, value in _WHERE_KNOWN.items():
        if _knows(name.encode()):
            chosen.append(f"--{name}={value}")
    return " ".join(chosen)


_WHERE_KNOWN = {
    "xla_cpu_use_fusion_emitters": "false",
    "xla_cpu_parallel_codegen_split_count": "1",
}


def _knows(flag: bytes) -> bool:
    folder = pathlib.Path(importlib.util.find_spec("jaxlib").origin).parent
    for library in folder.glob("libjax_common.*"):
        with (
            library.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            return content.find(flag) != -1
    return False
