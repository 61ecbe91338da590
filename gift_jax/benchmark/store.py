# SPDX-License-Identifier: Apache-2.0
"""What a benchmark has measured so far: one JSON line a cell, in cells.jsonl.

That file alone is enough to go on elsewhere. Several processes may work on one folder:
each cell is claimed by a lock, which the system drops when its process ends.
"""

import contextlib
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import filelock

from gift_jax.benchmark.matrix import Cell
from gift_jax.runtime.errors import UserError

FILE = "cells.jsonl"
LINE_BYTES = 2000  # of a cell, at most


class Store:
    """The results of one folder.

    Attributes: cells: {Cell.id: its line}. metrics: {name: what it means}. skipped:
      {name: why}. All as of the last `read`.
    """

    def __init__(self, workdir: pathlib.Path):
        self._workdir, self._path = workdir, workdir / FILE
        self.cells: dict[str, dict[str, Any]] = {}
        self.metrics: dict[str, Any] = {}
        self.skipped: dict[str, str] = {}
        self.versions: dict[str, list[str]] = {}

    def read(self) -> None:
        """Reads what all processes have written.

        A last line that was not written whole is left out.

        Raises: UserError for a line that is no JSON object of this file.
        """
        if not self._path.exists():
            return
        text = self._path.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(keepends=True), 1):
            if not line.endswith("\n"):
                break
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self._path}, line {number}: is no result of a benchmark; take "
                    "the line out, and its cell runs again"
                ) from error

    def _take(self, entry: dict[str, Any]) -> None:
        if "id" in entry:
            self.cells[entry["id"]] = entry
            return
        self.metrics |= entry["metrics"]
        self.skipped |= entry["skipped"]
        for name, version in entry["versions"].items():
            seen = self.versions.setdefault(name, [])
            if version not in seen:
                seen.append(version)

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        """Appends a cell's line, whole or not at all."""
        self._append({"id": cell.id} | result)

    def describe(self, **facts: dict[str, Any]) -> None:
        """Appends the metrics, skipped and versions of a cell, where they are new."""
        new = {
            "metrics": _without(facts["metrics"], self.metrics),
            "skipped": _without(facts["skipped"], self.skipped),
            "versions": {
                name: version
                for name, version in facts["versions"].items()
                if version not in self.versions.get(name, ())
            },
        }
        if any(new.values()):
            self._append(new)

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, separators=(",", ":"), sort_keys=True) + "\n"
        self._workdir.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self._path.with_name(f".{FILE}.lock")):
            with open(self._path, "a+b") as file:
                file.seek(0)
                whole = file.read().rfind(b"\n") + 1
                file.truncate(whole)  # of a line that a killed process began
                file.write(line.encode())
        self._take(entry)

    @contextlib.contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Claims a piece of work; yields False if another process has it."""
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        folder = self._workdir / ".claims"
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / digest, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


def changes(entry: dict[str, Any], digests: dict[str, str]) -> list[str]:
    """Returns the parts of a cell's settings that are not those of its line."""
    old = entry.get("digests", {})
    return [part for part, digest in digests.items() if old.get(part) != digest]


def _without(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in new.items() if name not in old}
