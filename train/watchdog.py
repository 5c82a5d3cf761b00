"""A process never hangs silently: it notes what it is at, and a thread ends it when that takes too long."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time

logger = logging.getLogger(__name__)

#: Time for the other processes, which wait too, to say for what, before the end of one ends all.
_GRACE_S = 3.0
#: The interpreter's timer also runs while the process is suspended, and must not end one that is continued.
_TIMER_FACTOR = 10.0
_STDERR = 2


def margin_s(timeout_s: float) -> float:
    """How much later a watchdog speaks than what has a time-out of its own."""
    return 1.0 + min(10.0, 0.1 * timeout_s)


class Watchdog:
    """Ends this process with an error when it has been at one thing for a bit longer than `timeout_s`.

        note      note   note                                   error, names the last note    end
        |---------|------|--------------- timeout_s ------------|----------- grace -----------|

    A bit longer, so that what waits with a time-out of its own, as the loader does, comes first: it knows more. Only
    time counts in which this thread runs: a process that was suspended, and is continued, has not hung. If the main
    thread hangs without letting other threads run, as in a page fault on a dead file system, this thread cannot speak
    either: then, after ten times as long, the interpreter's own timer shows where the thread is, and ends the process.
    """

    def __init__(self, who: str, timeout_s: float):
        self._who, self._timeout_s = who, timeout_s
        self._limit_s = timeout_s + margin_s(timeout_s)
        self._note: tuple[str] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def note(self, what: str | None) -> None:
        """From now on the process waits for `what`; None: for nothing that has to end soon."""
        self._note = None if what is None else (what,)  # a new object, also for the same words

    @property
    def noted(self) -> str:
        """The last note."""
        return self._note[0] if self._note else "nothing"

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        tick_s = min(1.0, self._limit_s / 10)
        seen, waited_s, last_s = None, 0.0, time.monotonic()
        try:
            while not self._closed.wait(tick_s):
                note, now_s = self._note, time.monotonic()
                if note is None:
                    faulthandler.cancel_dump_traceback_later()
                else:
                    faulthandler.dump_traceback_later(_TIMER_FACTOR * self._limit_s, exit=True, file=_STDERR)
                waited_s = waited_s + min(now_s - last_s, 2 * tick_s) if note is seen else 0.0
                seen, last_s = note, now_s
                if note is not None and waited_s > self._limit_s:
                    self._end(note[0], waited_s)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _end(self, what: str, waited_s: float) -> None:
        logger.critical(
            "%s has waited %.0f s for %s. Another process, a disk or the network does not answer, or this is slow: the "
            "run ends. The same command goes on from the last checkpoint; train.timeout_s=%g is how long to wait.",
            self._who,
            waited_s,
            what,
            self._timeout_s,
        )
        time.sleep(_GRACE_S)
        os._exit(1)
