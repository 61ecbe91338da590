# SPDX-License-Identifier: Apache-2.0
"""What SIGINT and SIGTERM do: a checkpoint, then the end, and soon.

While steps are taken, `collected` notes the signal and the loop saves before it stops.
At all other times there is nothing to save, and the process ends: at once where Python
runs, and after `GRACE_S` where it is inside a compilation, which no exception reaches,
or in a callback (of the garbage collector, a `__del__`), which lets none out.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

import jax
from absl import logging

GRACE_S = 5.0


class StoppedBySignal(BaseException):  # noqa: N818 - an event, not an error
    """The run was asked to stop, and has saved a checkpoint if it had what to save.

    As KeyboardInterrupt no Exception: a library's `except Exception` must not take it.
    """

    def __init__(self, signum: int, saved: bool = True):
        after = " after a checkpoint" if saved else ""
        super().__init__(f"stopped by signal {signum}{after}")
        self.exit_code = 128 + signum


class _Guard:
    """A thread that ends the process where a signal has not done so in time.

    Attributes: collected: set when the loop has noted the signal, and will stop itself.
    """

    def __init__(self):
        self.collected = threading.Event()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._wait, args=(reader,), daemon=True).start()

    def _wait(self, reader: int) -> None:
        while True:
            (signum,) = os.read(reader, 1)
            if signum not in (signal.SIGINT, signal.SIGTERM):
                continue
            if not self.collected.wait(GRACE_S) and (_ending or not _patient):
                event = StoppedBySignal(signum, saved=False)
                print(f"{event}; run the same command to go on", file=sys.stderr)
                sys.stderr.flush()
                os._exit(event.exit_code)


_guard: _Guard | None = None
_patient = False  # steps are being taken, whose end is worth any wait
_ending = False  # `_end` has raised; what is still there after a while has swallowed it


def watch() -> None:
    """From now on SIGTERM ends the process with exit code 143, wherever it is."""
    global _guard
    _guard = _guard or _Guard()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, _end)


def _end(signum, frame):
    global _ending
    _ending = True
    if signum == signal.SIGINT:
        signal.default_int_handler(signum, frame)
    raise StoppedBySignal(signum, saved=False)


def be_patient(patient: bool) -> None:
    """Says whether steps are being taken, the first of them compiled and done."""
    global _patient
    _patient = patient


@contextlib.contextmanager
def collected() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list instead of dying; a second one kills.

    Before `be_patient` says so there is nothing to save, and the first one does.

    Of several processes, JAX's own service takes SIGTERM: see `hosts.asked_to_stop`.
    """
    received: list[int] = []

    def handle(signum, frame):
        if not _patient:
            _end(signum, frame)
        if _guard:
            _guard.collected.set()
        received.append(signum)
        signal.signal(signum, signal.default_int_handler)
        logging.warning("signal %d: saving a checkpoint, then stopping", signum)

    old = {}
    alone = (signal.SIGTERM,) if jax.process_count() == 1 else ()
    for signum in (signal.SIGINT, *alone):
        with contextlib.suppress(ValueError):  # not in the main thread
            old[signum] = signal.signal(signum, handle)
    try:
        yield received
    finally:
        be_patient(False)
        for signum, handler in old.items():
            signal.signal(signum, handler)
