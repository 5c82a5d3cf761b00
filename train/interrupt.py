"""Ctrl-C (SIGINT) and SIGTERM: the end comes at once, with one line, and with the exit code 128 + signal."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def say_stopped(number: int) -> None:
    """The one line, below a progress bar."""
    sys.stderr.write(f"\nstopped by {signal.Signals(number).name}: the same command goes on from the last checkpoint\n")
    sys.stderr.flush()


@contextmanager
def ending_at_once() -> Iterator[None]:
    """The signals end this process, also in the middle of a long call of a library, where Python's handlers wait.

    Nothing is tidied up, and nothing needs it: files are written under other names, and renamed when they are whole.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def end() -> None:
        while number := os.read(reading, 1):  # b"" when the other end is closed
            if number[0] in _SIGNALS:  # others that a library handles in Python come here too
                say_stopped(number[0])
                os._exit(128 + number[0])

    thread = threading.Thread(target=end, name="interrupt", daemon=True)
    thread.start()
    with _handlers(lambda *_: None):
        former = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(former)
            os.close(writing)
            thread.join()
            os.close(reading)


@contextmanager
def children_unaware(on_signal: Callable[[int, FrameType | None], NoReturn]) -> Iterator[None]:
    """Processes that are started meanwhile do not see a terminal's Ctrl-C before they call `obey`.

    A Python that is still importing would answer with a traceback. What a thread blocks is inherited by its children;
    in this process another thread takes the signal, and `on_signal` runs as ever in this one.
    """
    done = threading.Event()
    other = threading.Thread(target=done.wait, name="interrupt", daemon=True)
    other.start()
    with _handlers(on_signal):
        former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
            done.set()
            other.join()


def obey() -> None:
    """In a child: both signals end the process, by the kernel's hand, whatever it is doing."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


@contextmanager
def _handlers(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    former = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, before)
