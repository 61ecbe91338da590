# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml asks for, and what that brings to this environment."""

import importlib.metadata
import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]


def requirements(extra: str = "") -> list[str]:
    """Returns what a plain install, or an extra, asks for; extras in it are opened."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    if not extra:
        return project["dependencies"]
    lines = []
    for line in project["optional-dependencies"][extra]:
        ours = re.fullmatch(r"gift-jax\[(\w+)\]", line)
        lines += requirements(ours[1]) if ours else [line]
    return lines


def split(line: str) -> tuple[str, str]:
    """Returns name and version range of a requirement without a marker."""
    return re.fullmatch(r"([\w.-]+)(?:\[[\w,]*\])?\s*(.*)", line).groups()


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def closure(lines: list[str]) -> dict[str, set[str]]:
    """Returns every distribution that the requirements bring here, and who wants it."""
    from packaging.requirements import Requirement  # the sets need Python alone

    wanted, done = {}, set()
    queue = [(Requirement(line), None) for line in lines]
    while queue:
        want, by = queue.pop()
        name, extras = canonical(want.name), frozenset(want.extras) | {""}
        wanted.setdefault(name, set()).update({by} - {None, name})
        if (name, extras) in done or not installed(name):
            continue
        done.add((name, extras))
        for child in map(Requirement, installed(name).requires or ()):
            marker = child.marker
            if not marker or any(marker.evaluate({"extra": e}) for e in extras):
                queue.append((child, name))
    return wanted


def plain() -> dict[str, set[str]]:
    """Returns a plain install's closure; ends the command if a part is not here."""
    wanted = closure(requirements())
    if lacking := sorted(name for name in wanted if not installed(name)):
        fail(f"not installed here: {', '.join(lacking)}; try pip install -e .")
    return wanted


def fail(message: str):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
