"""Throughput, and how much of the time training waits for data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Meter:
    """Times `next()` on the loader against the whole step.

        | next | forward backward update | next | ... | lap        data_wait_pct = 100 * sum(next) / (lap - lap before)

    The clock starts before the first `next()`: a clock that starts when the batch has arrived cannot see a slow loader.
    Work queued on a GPU counts only if the caller has waited for it before `lap`.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start_s = clock()
        self._wait_s = 0.0
        self._num_samples = 0

    def next(self, loader: Iterator[T]) -> T:
        """The loader's next item."""
        before_s = self._clock()
        item = next(loader)
        self._wait_s += self._clock() - before_s
        return item

    def count(self, num_samples: int) -> None:
        """Add the samples of a finished step, over all processes."""
        self._num_samples += num_samples

    def lap(self) -> dict[str, float]:
        """{"samples_per_s", "data_wait_pct"} since the last lap, and start a new one."""
        now_s = self._clock()
        elapsed_s = now_s - self._start_s
        rates = {
            "samples_per_s": self._num_samples / elapsed_s,
            "data_wait_pct": 100.0 * self._wait_s / elapsed_s,
        }
        self._start_s, self._wait_s, self._num_samples = now_s, 0.0, 0
        return rates
