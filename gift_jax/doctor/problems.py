# SPDX-License-Identifier: Apache-2.0
"""What is wrong with an installation, each in one line with the fix."""

import re
from typing import Any

from gift_jax.doctor.fits import GB
from gift_jax.doctor.machine import MISSING, is_unknown
from gift_jax.runtime.errors import install_command

SMALL_BYTES = 2.4 * GB  # what `train` takes of configs/emoji_gift_gate.py:smoke
SMALL_DISK_BYTES = 1 * GB
CUDA13_DRIVER = 580  # the oldest driver for it


def problems(report: dict[str, Any]) -> list[str]:
    """Returns one line for each problem; args: report: of `examine`."""
    checks = (_packages, _jax, _gpu, _tpu, _memory, _cache, _size)
    return [line for check in checks for line in check(report)]


def memory_of_one(report: dict[str, Any]) -> Any:
    """Returns the bytes of the smallest device, of a CPU the machine's; or unknown."""
    devices = report["devices"]["jax"]
    if is_unknown(devices):
        return devices
    if all(device["platform"] == "cpu" for device in devices):
        return report["machine"]["memory_bytes"]
    sizes = [d["memory_bytes"] for d in devices if d["platform"] != "cpu"]
    return "unknown (JAX does not say)" if None in sizes else min(sizes)


def _has_only_cpu(report) -> bool:
    devices = report["devices"]["jax"]
    return not is_unknown(devices) and all(d["platform"] == "cpu" for d in devices)


def _packages(report):
    missing = [k for k, v in report["libraries"].items() if v == MISSING]
    if missing:
        names = ", ".join(missing)
        yield f"{names} not installed; pip install . in a clone of gift_jax"


def _jax(report):
    devices = report["devices"]["jax"]
    if is_unknown(devices):
        platforms = report["environment"].get("JAX_PLATFORMS")
        fix = f"unset JAX_PLATFORMS, which is {platforms}, or " if platforms else ""
        yield f"JAX has no devices: {devices}; {fix}install the extra for this machine"


def _gpu(report):
    driver = report["devices"]["nvidia_driver"]
    if driver == "none" or is_unknown(driver) or not _has_only_cpu(report):
        return
    here = f"an NVIDIA driver ({driver}) is here, but JAX has only the CPU"
    platforms = report["environment"].get("JAX_PLATFORMS")
    if platforms:
        yield f"{here}, as JAX_PLATFORMS={platforms} says; unset it"
        return
    major = re.match(r"\d+", driver)
    is_old = bool(major) and int(major[0]) < CUDA13_DRIVER
    extra = "cuda12" if is_old else "cuda13"
    plugins = {k: v for k, v in report["extras"].items() if k.startswith("cuda")}
    installed = [f"{k} {v}" for k, v in plugins.items() if v != MISSING]
    if installed:
        here += (
            f" although {', '.join(installed)} is installed: it must be as new as "
            f"jaxlib {report['libraries']['jaxlib']}, and cuda13 needs driver "
            f"{CUDA13_DRIVER}"
        )
    yield f"{here}; {install_command(extra)}"


def _tpu(report):
    if not report["devices"]["tpu_chip"] or not _has_only_cpu(report):
        return
    here = "a TPU is here, but JAX has only the CPU"
    platforms = report["environment"].get("JAX_PLATFORMS")
    if platforms:
        yield f"{here}, as JAX_PLATFORMS={platforms} says; unset it"
    elif report["extras"]["tpu"] != MISSING:
        yield f"{here}; end the process that uses it (lsof /dev/accel0)"
    else:
        yield f"{here}; {install_command('tpu')}"


def _memory(report):
    free = report["machine"]["memory_free_bytes"]
    if not is_unknown(free) and free < SMALL_BYTES:
        yield (
            f"{free / GB:.1f} GB of memory are free, and even the embedded model takes "
            f"about {SMALL_BYTES / GB:.1f}; end other programs"
        )


def _cache(report):
    caches = report["caches"]
    if caches["writable"] != "yes":
        yield (
            f"{caches['folder']} cannot be written: {caches['writable']}; set "
            "GIFT_JAX_CACHE to a folder that can"
        )
        return
    free = caches["disk_free_bytes"]
    if not is_unknown(free) and free < SMALL_DISK_BYTES:
        yield (
            f"{free / GB:.1f} GB are free for {caches['folder']}; make room, or set "
            "GIFT_JAX_CACHE to a folder on another disk"
        )


def _size(report):
    memory, rows = memory_of_one(report), report["fits"]
    if is_unknown(memory) or is_unknown(rows):
        return
    least = min(rows, key=lambda row: row["total_bytes"])
    if least["total_bytes"] > memory:
        yield (
            f"no published model fits: {least['method']} on {least['model']} takes "
            f"{least['total_bytes'] / GB:.1f} GB and activations, and one device has "
            f"{memory / GB:.1f}; use the embedded model, a larger device, or several "
            "with --config.hardware.mesh.fsdp"
        )
