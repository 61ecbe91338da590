# SPDX-License-Identifier: Apache-2.0
"""Says what is installed, what it runs on, what fits, and what is wrong.

    gift-jax doctor                  # to read, or to paste into a bug report
    gift-jax doctor --json FILE      # the same as JSON, besides

Nothing is downloaded, changed or sent. Of the environment only the variables of JAX,
XLA and gift_jax are shown. Exit code: 0 without problems, 1 with some.
"""

import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from gift_jax.doctor import fits, machine
from gift_jax.doctor.fits import GB
from gift_jax.doctor.machine import is_unknown, known
from gift_jax.doctor.problems import memory_of_one, problems
from gift_jax.runtime import cli, files
from gift_jax.runtime.errors import UserError, escaped


def examine() -> dict[str, Any]:
    """Returns all that is reported, as JSON has it; sizes in bytes."""
    report: dict[str, Any] = {
        "package": machine.package(),
        "libraries": machine.versions(machine.REQUIRED),
        "pytorch": machine.versions(machine.OPTIONAL),
        "extras": machine.extras(),
        "tpu_compiler": known(machine.tpu_compiler),
        "machine": machine.machine(),
        "environment": machine.environment(),
        "devices": machine.devices(),
        "caches": machine.caches(),
    }
    memory = memory_of_one(report)
    report["device_memory_bytes"] = memory
    report["fits"] = known(lambda: [need.as_dict(memory) for need in fits.needs()])
    report["problems"] = problems(report)
    return _without_home(report)


def _without_home(value: Any) -> Any:
    """Returns a value, the home folder as ~ in every text: it has the user's name."""
    if isinstance(value, dict):
        return {key: _without_home(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_home(item) for item in value]
    home = known(lambda: str(pathlib.Path.home()))
    if isinstance(value, str) and len(home) > 1:
        return escaped(value).replace(home, "~")
    return value


# --- text -----------------------------------------------------------------------------


def text(report: dict[str, Any]) -> str:
    """Returns a report as lines to read."""
    sections = {
        "versions": _aligned(_versions(report)),
        "machine": _aligned(_machine(report["machine"])),
        "devices": _aligned(_devices(report["devices"])),
        "environment": _aligned(report["environment"].items()) or ["nothing set"],
        "caches": _aligned(_caches(report["caches"])),
        "what fits": _fits(report),
        "problems": report["problems"] or ["none"],
    }
    lines = []
    for name, content in sections.items():
        lines += [name, *(f"  {line}" for line in content)]
    return "\n".join(lines)


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns rows as lines, their columns aligned."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _size(size: Any) -> str:
    """Returns bytes in words, or why they are not known."""
    if size is None:
        return "unknown (JAX does not say)"
    return size if isinstance(size, str) else f"{size / GB:.2f} GB"


def _list(facts: dict[str, str]) -> str:
    return ", ".join(f"{name} {fact}" for name, fact in facts.items())


def _versions(report):
    yield "gift_jax", _list(report["package"]).removeprefix("gift_jax ")
    yield "libraries", _list(report["libraries"])
    yield "PyTorch, optional", _list(report["pytorch"])
    yield "extras", _list(report["extras"])
    yield "TPU compiler", report["tpu_compiler"]


def _machine(facts):
    yield "system", facts["system"]
    yield "processor", f"{facts['processor']}, {facts['cores']} cores for this process"
    free = _size(facts["memory_free_bytes"])
    yield "memory", f"{_size(facts['memory_bytes'])}, {free} free"


def _devices(facts):
    devices = facts["jax"]
    if is_unknown(devices):
        yield "JAX", devices
        devices = []
    for device in devices:
        memory = "the machine's memory; commands may divide it, one for each core"
        if device["platform"] != "cpu":
            memory = f"memory of each for JAX: {_size(device['memory_bytes'])}"
        name = f"{device['count']} x {device['platform']}, {device['kind']}"
        yield "JAX", f"{name}, {memory}"
    yield "NVIDIA driver", facts["nvidia_driver"]
    yield "TPU chip", "yes" if facts["tpu_chip"] else "none"


def _caches(facts):
    free = _size(facts["disk_free_bytes"])
    yield "folder", f"{facts['folder']}, writable: {facts['writable']}, {free} free"
    sizes = facts["bytes"]
    if not is_unknown(sizes):
        sizes = ", ".join(f"{name} {_size(size)}" for name, size in sizes.items())
    yield "content", sizes
    yield "Hugging Face", facts["hub_folder"]
    models = facts["hub_models"]
    if not is_unknown(models):
        states = {name: state for name, state in models.items() if state != "no"}
        models = _list(states) or "none of the published models"
    yield "  in it", models


def _fits(report):
    """Returns the lines of the table of what fits."""
    rows, memory = report["fits"], report["device_memory_bytes"]
    if is_unknown(rows):
        return [rows]
    heads = ["GB, by arithmetic", "method", "parameters", "trained", "frozen, bf16"]
    heads += ["trained, f32", "moments", "gradients", "  sum"]
    table = [[*heads, f"fits on one device of {_size(memory)}"]]
    parts = [f"{name}_bytes" for name in ("frozen", "trained", "moments", "gradients")]
    for row in rows:
        counts = [f"{row[name] / 1e6:6.1f} M" for name in ("parameters", "trained")]
        sizes = [f"{row[name] / GB:5.2f}" for name in [*parts, "total_bytes"]]
        verdict = _verdict(row, memory)
        table.append([row["model"], row["method"], *counts, *sizes, verdict])
    measured = [
        f"{fits.SIZES[name].title}: {figures}, docs/lab/speed.md"
        for name, figures in fits.ACTIVATIONS.items()
    ]
    return [
        *_aligned(table),
        "with config.compute_dtype=bfloat16; plus activations, which depend on the "
        "batch, the resolution and remat:",
        *(f"  {line}" for line in measured),
        "  the others are not measured; gift-jax compile computes them for TPUs",
    ]


def _verdict(row: dict[str, Any], memory: Any) -> str:
    if is_unknown(memory):
        return "unknown"
    if row["devices"] == 1:
        return f"yes, {(memory - row['total_bytes']) / GB:.2f} left"
    if row["devices"] is None:
        return "no, nor divided over several"
    return f"no; on {row['devices']}, with mesh.fsdp and shard_frozen"


def main(argv: list[str] | None = None) -> int:
    flags = cli.parser(__doc__, "doctor")
    flags.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="file for the same as JSON; without a name, JSON in place of the text",
    )
    args = flags.parse_args(argv)
    report = examine()
    if args.json == "-":
        print(json.dumps(report, indent=1, sort_keys=True))
    else:
        print(text(report))
    if args.json and args.json != "-":
        try:
            files.write_json(args.json, report)
        except OSError as error:
            message = f"--json={args.json}: {error.strerror}; name another file"
            raise UserError(message) from error
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    cli.run_main(main)
