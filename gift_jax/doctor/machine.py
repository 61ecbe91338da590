# SPDX-License-Identifier: Apache-2.0
"""What is installed, what JAX has to compute on, and what lies in the caches."""

import importlib.metadata
import os
import pathlib
import platform
import re
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import gift_jax
from gift_jax.runtime import files
from gift_jax.runtime.versions import versions_and_commit

REQUIRED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
OPTIONAL = ("torch", "diffusers", "peft")
EXTRAS = {  # of pyproject.toml: the package that shows that one is installed
    "cuda13": "jax-cuda13-plugin",
    "cuda12": "jax-cuda12-plugin",
    "tpu": "libtpu",
    "nudity": "nudenet",
}
MISSING = "not installed"
CACHES = {  # folder of caches -> what it holds
    "xla": "compiled programs",
    "generated": "generated images",
    "single_files": "single files",
}
_VARIABLES = ("JAX_", "XLA_", "GIFT_JAX_")
_START_S = 60  # for JAX to find its devices


def known(fact: Callable[[], Any]) -> Any:
    """Returns a fact, or "unknown (why)".

    Every error is caught, whatever it is: what is broken is what this command is for.
    """
    try:
        return fact()
    except Exception as error:
        lines = [type(error).__name__, *str(error).strip().splitlines()[:1]]
        return f"unknown ({': '.join(lines):.250})"


def is_unknown(fact: Any) -> bool:
    """Whether `known` could not find a fact out."""
    return isinstance(fact, str) and fact.startswith("unknown (")


# --- versions and the machine ---------------------------------------------------------


def versions(names: Sequence[str]) -> dict[str, str]:
    """Returns packages' versions by their metadata; none of them is imported."""
    return {name: known(lambda name=name: _version(name)) for name in names}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return MISSING


def package() -> dict[str, str]:
    """Returns the versions of gift_jax, with its commit in a clone, and of Python."""
    commit = known(lambda: versions_and_commit().get("commit", ""))
    of_commit = "" if is_unknown(commit) or not commit else f" ({commit[:12]})"
    return {
        "gift_jax": gift_jax.__version__ + of_commit,
        "Python": platform.python_version(),
    }


def extras() -> dict[str, str]:
    """Returns the version of what each extra installs."""
    return {name: known(lambda name=name: _version(EXTRAS[name])) for name in EXTRAS}


def tpu_compiler() -> str:
    """Returns "yes", or why `gift-jax compile` finds no compiler."""
    from gift_jax.compile.child import check_compiler
    from gift_jax.runtime.errors import UserError

    try:
        check_compiler()
    except UserError as error:
        return f"no ({error})"
    return "yes"


def machine() -> dict[str, Any]:
    """Returns the system, the processor, the cores of this process, and the memory."""
    return {
        "system": known(platform.platform),
        "processor": known(_processor),
        "cores": known(_cores),
        "memory_bytes": known(_memory),
        "memory_free_bytes": known(_free_memory),
    }


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return match[1].strip() if match else platform.processor() or platform.machine()


def _cores() -> int:
    from gift_jax.runtime.devices import num_cores  # it imports JAX

    return num_cores()


def _memory() -> int:
    """Returns the machine's memory, or a container's limit, if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        file = pathlib.Path("/sys/fs/cgroup", name)
        limit = file.read_text().strip() if file.exists() else ""
        total = min(total, int(limit)) if limit.isdigit() else total
    return total


def _free_memory() -> int:
    text = pathlib.Path("/proc/meminfo").read_text()
    (available,) = re.findall(r"^MemAvailable:\s*(\d+) kB", text, re.M)
    return 1024 * int(available)


def environment() -> dict[str, str]:
    """Returns the variables that JAX and gift_jax read, and no others."""
    return {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)}


# --- devices --------------------------------------------------------------------------


def devices() -> dict[str, Any]:
    """Returns the devices that JAX has, alike ones counted, and what else there is.

    Returns: "jax": a list of platform, kind, count and memory_bytes (None if JAX does
    not say; of a GPU, what JAX may take: three quarters by default); "nvidia_driver":
    its version, or "none"; "tpu_chip": whether there is one.
    """
    return {
        "jax": known(_jax_devices),
        "nvidia_driver": known(nvidia_driver),
        "tpu_chip": pathlib.Path("/dev/accel0").exists(),
    }


def _jax_devices() -> list[dict[str, Any]]:
    # or JAX would take most of a GPU's memory for as long as this runs
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    results: list[Any] = []

    def start():
        import jax

        return [(d.platform, d.device_kind, _limit(d)) for d in jax.local_devices()]

    def run():
        try:
            results.append(start())
        except Exception as error:
            results.append(error)

    # One host of a TPU pod waits for the others: do not wait with it.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_START_S)
    if not results:
        raise TimeoutError(f"no devices after {_START_S} s")
    if isinstance(results[0], Exception):
        raise results[0]
    names = ("platform", "kind", "memory_bytes")
    return [
        dict(zip(names, device, strict=True)) | {"count": count}
        for device, count in Counter(results[0]).items()
    ]


def _limit(device) -> int | None:
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except Exception:  # not every platform has these figures
        return None


def nvidia_driver() -> str:
    """Returns the version of the NVIDIA driver; "none" if there is none."""
    file = pathlib.Path("/proc/driver/nvidia/version")
    if file.exists():
        return driver_version(file.read_text())
    if shutil.which("nvidia-smi"):  # under Windows' Linux there is no such file
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    exists = pathlib.Path("/dev/nvidia0").exists()
    return "of an unknown version" if exists else "none"


def driver_version(text: str) -> str:
    """Returns the version in what the kernel says of its NVIDIA driver."""
    match = re.search(r"\b\d{3,}\.\d+[.\d]*", text)
    return match[0] if match else "of an unknown version"


# --- caches ---------------------------------------------------------------------------


def caches() -> dict[str, Any]:
    """Returns where the caches lie, what is in them, and whether they can grow."""
    return {
        "folder": known(lambda: str(files.cache_folder())),
        "writable": known(lambda: _try_to_write(files.cache_folder())),
        "bytes": known(lambda: _sizes(files.cache_folder())),
        "disk_free_bytes": known(lambda: _free_disk(files.cache_folder())),
        "hub_folder": known(lambda: str(_hub_folder())),
        "hub_models": known(_hub_models),
    }


def _existing(folder: pathlib.Path) -> pathlib.Path:
    """Returns the folder, or the first above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _free_disk(folder: pathlib.Path) -> int:
    return shutil.disk_usage(_existing(folder)).free


def _try_to_write(folder: pathlib.Path) -> str:
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)) as file:
            file.write(b"0")
    except OSError as error:
        return f"no ({error.strerror})"
    return "yes"


def _sizes(folder: pathlib.Path) -> dict[str, int]:
    sizes = {CACHES[name]: _size(folder / name) for name in CACHES}
    return sizes | {"other": _size(folder) - sum(sizes.values())}


def _size(folder: pathlib.Path) -> int:
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(where, name)).st_size
            except OSError:  # removed meanwhile
                continue
    return total


def _hub_folder() -> pathlib.Path:
    from huggingface_hub import constants

    return pathlib.Path(constants.HF_HUB_CACHE)


def _hub_models() -> dict[str, str]:
    """Returns {hub id of a published model: whether its weights are in the cache}."""
    from gift_jax.models import load, weights

    root = _hub_folder()
    return {
        name: _hub_state(root, name, configs.keys() & {*weights.COMPONENTS})
        for family in load.FAMILIES
        for name, configs in family.published.items()
    }


def _hub_state(root: pathlib.Path, name: str, components: Collection[str]) -> str:
    folder = root / f"models--{name.replace('/', '--')}"
    for snapshot in folder.glob("snapshots/*"):
        files = (snapshot.glob(f"{part}/*.safetensors") for part in components)
        if all(any(file.exists() for file in found) for found in files):
            return "yes"
    return "incomplete" if folder.exists() else "no"
