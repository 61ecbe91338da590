# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM: a checkpoint while a run takes steps, otherwise the end.

Python runs signal handlers between bytecodes: a signal that arrives during a
compilation, which is one call into C++, takes effect when the compilation returns.
"""

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence

from absl import logging

from gift_jax.runtime.errors import StoppedBySignal

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SignalFlag:
    """Handles SIGINT and SIGTERM; see `flag`, the one of this process.

    Attributes:
      signum: the first signal that arrived, or None. The training loop reads it after
        every step, and so notices a signal whose exception a callback has swallowed.
      deferred: whether a first signal only sets `signum`. A second one, and any signal
        while this is False, raises StoppedBySignal at once.
    """

    def __init__(self):
        self.signum: int | None = None
        self.deferred = False
        self._several = False

    def install(self, signals: Sequence[int] = SIGNALS) -> dict:
        """Handles these signals from now on; returns the handlers before."""
        old = {}
        for signum in signals:
            with contextlib.suppress(ValueError):  # not in the main thread
                old[signum] = signal.signal(signum, self._handle)
        return old

    @contextlib.contextmanager
    def in_loop(self, several: bool = False) -> Iterator["SignalFlag"]:
        """Handles the signals while a loop takes steps, and restores the handlers.

        Args: several: this is one of several processes. JAX's preemption service then
          takes SIGTERM and lets all of them stop after the same step; SIGINT is passed
          on to it.
        Raises: StoppedBySignal at its end if there was a signal.
        """
        self._several = several
        old = self.install((signal.SIGINT,) if several else SIGNALS)
        try:
            yield self
            if self.signum is not None:
                raise StoppedBySignal(self.signum)
        finally:
            self.signum, self.deferred = None, False
            for signum, handler in old.items():
                signal.signal(signum, handler)

    def _handle(self, signum, frame):
        repeated, self.signum = self.signum is not None, signum
        if repeated or not self.deferred:
            raise StoppedBySignal(signum, saved=False)
        logging.warning("signal %d: saving a checkpoint, then stopping", signum)
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)


flag = SignalFlag()
