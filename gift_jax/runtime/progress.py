# SPDX-License-Identifier: Apache-2.0
"""A progress line with time left: a live bar on a terminal, log lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping

from absl import logging

LINE_EVERY_S = 15.0  # without a terminal, one line this often


class Bar:
    """Reports progress of one task; see `bar`."""

    def __init__(self, name: str, total: int, start: int):
        self._name, self._total = name, total
        self._last = time.monotonic()
        self._first: tuple[int, float] | None = None  # its time is mostly compilation
        self._live = None
        quiet = logging.get_verbosity() < logging.INFO  # of several, not the first
        if sys.stderr.isatty() and not quiet:
            self._live = _rich_bar()
            self._live.start()
            self._task = self._live.add_task(
                name, total=total, completed=start, values=""
            )

    def update(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """Shows `done` of total; values: numbers to show beside it."""
        text = _losses(values or {})
        if self._live:
            self._live.update(self._task, completed=done, values=text)
            return
        now = time.monotonic()
        if self._first is None:
            self._first = (done, now)
        if now - self._last >= LINE_EVERY_S or done == self._total:
            self._last = now
            pace = self._pace(done, now)
            logging.info("%s %d/%d %s%s", self._name, done, self._total, text, pace)

    def _pace(self, done: int, now: float) -> str:
        first, began = self._first
        if done == first:
            return ""
        rate = (now - began) / (done - first)
        left = _clock(rate * (self._total - done))
        return f" {rate:.3g} s each, {left} left"

    def close(self) -> None:
        if self._live:
            self._live.stop()


@contextlib.contextmanager
def bar(name: str, total: int, start: int = 0) -> Iterator[Bar]:
    """A progress display for `total` items, of which `start` are done already."""
    shown = Bar(name, total, start)
    try:
        yield shown
    finally:
        shown.close()


class Clock:
    """Says how far a list of long parts is, each of which reports its own progress."""

    def __init__(self, total: int):
        self._total, self._done, self._began = total, 0, time.monotonic()

    def tick(self) -> str:
        """Counts one more as done; returns "3 of 10, 0:42:10 left"."""
        self._done += 1
        rate = (time.monotonic() - self._began) / self._done
        left = _clock(rate * (self._total - self._done))
        return f"{self._done} of {self._total}, {left} left"


def _rich_bar():
    from rich import console, progress

    return progress.Progress(
        progress.TextColumn("{task.description:>28}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[values]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        console=console.Console(stderr=True),
    )


def _losses(values: Mapping[str, float]) -> str:
    kept = [(k, v) for k, v in values.items() if k.endswith("loss")]
    return " ".join(f"{k} {v:.4g}" for k, v in kept)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    )
