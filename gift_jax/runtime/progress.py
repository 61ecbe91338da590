# SPDX-License-Identifier: Apache-2.0
"""A progress line with time left: a live bar on a terminal, log lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from absl import logging

LINE_EVERY_S = 15.0  # without a terminal, one line this often


class Bar:
    """Reports progress of one task; see `bar`."""

    def __init__(self, name: str, total: int, start: int):
        self._name, self._total = name, total
        self._logged_at = time.monotonic()
        self._first: tuple[int, float] | None = None  # item and time, once compiled
        self._live = None
        quiet = logging.get_verbosity() < logging.INFO  # not the main process
        if sys.stderr.isatty() and not quiet:
            self._live = _rich_bar()
            self._live.start()
            self._task = self._live.add_task(
                name, total=total, completed=start, values=""
            )

    def update(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """Shows that `done` of the total are done, and of `values` what tells most.

        That is the losses, and the shares at which a gate detects something or closes.
        """
        text = _shown(values or {})
        if self._live:
            self._live.update(self._task, completed=done, values=text)
            return
        now = time.monotonic()
        if self._first is None:
            self._first = (done, now)
        if now - self._logged_at >= LINE_EVERY_S or done == self._total:
            self._logged_at = now
            time_left = self._time_left(done, now)
            logging.info(
                "%s %d/%d %s%s", self._name, done, self._total, text, time_left
            )

    def _time_left(self, done: int, now: float) -> str:
        first, began = self._first
        if done == first or now - began < 0.1:  # they were done before
            return ""
        seconds = (now - began) / (done - first)
        left = _clock(seconds * (self._total - done))
        return f" {seconds:.3g} s each, {left} left"

    def close(self) -> None:
        if self._live:
            self._live.stop()


@contextlib.contextmanager
def bar(name: str, total: int, start: int = 0) -> Iterator[Bar]:
    """A progress display of `total` items, of which `start` are done already."""
    display = Bar(name, total, start)
    try:
        yield display
    finally:
        display.close()


class Clock:
    """Estimates the time left of several long tasks."""

    def __init__(self, total: int):
        self._total, self._done, self._began = total, 0, time.monotonic()

    def tick(self) -> str:
        """Counts one more task as done; returns "3 of 10, 0:42:10 left"."""
        self._done += 1
        seconds = (time.monotonic() - self._began) / self._done
        left = _clock(seconds * (self._total - self._done))
        return f"{self._done} of {self._total}, {left} left"


class Timetable:
    """Estimates the time left of parts whose times are known of another machine.

    Compilation, which no rate foretells, is in them.

    Args: seconds: of each part, in order, on that machine. What the parts that are done
      have taken says how fast this one is; a part that was done before counts as none.
    """

    def __init__(self, seconds: Sequence[float]):
        self._seconds, self._done = list(seconds), -1
        self._began = time.monotonic()
        self._expected = self._taken = 0.0

    def next(self) -> str:
        """Begins the next part; returns "part 3 of 10, about 2:10 left"."""
        now = time.monotonic()
        if self._done >= 0:
            taken, expected = now - self._began, self._seconds[self._done]
            if taken > 0.1 * expected:
                self._taken += taken
                self._expected += expected
        self._done, self._began = self._done + 1, now
        return f"part {self._done + 1} of {len(self._seconds)}, {self.left()} left"

    def left(self) -> str:
        """Returns "about 2:10" for the part that runs and those after it."""
        pace = self._taken / self._expected if self._expected else 1.0
        rest = sum(self._seconds[max(0, self._done) :])
        return f"about {_clock(pace * rest)}"


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


def _shown(values: Mapping[str, float]) -> str:
    ends = ("loss", "detected", "closed")
    return " ".join(f"{k} {v:.4g}" for k, v in values.items() if k.endswith(ends))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    )
