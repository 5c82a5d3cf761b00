"""Throughput, and how much of the time training waits for data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class GpuTimeline:
    """When the GPU finished a step, on the host's clock: a host that runs ahead of it sees that only from events."""

    def __init__(self) -> None:
        import torch

        self._new_event = lambda: torch.cuda.Event(enable_timing=True)
        self._synchronize = torch.cuda.synchronize
        self.restart()

    def restart(self) -> None:
        """Wait for the GPU and begin anew: an event's time since the first one has only 24 bits."""
        self._base = self._new_event()
        self._base.record()
        self._synchronize()
        self._base_s = time.perf_counter()
        self._last = self._base

    def step_queued(self) -> None:
        """Note that all of a step's work has been queued."""
        self._last = self._new_event()
        self._last.record()

    def busy_until(self, now_s: float) -> float:
        """Host time at which the GPU finished the last step; `now_s` if it still computes."""
        return self._base_s + self._base.elapsed_time(self._last) / 1e3 if self._last.query() else now_s


class Meter:
    """Times `next()` on the loader against the whole step.

        CPU   | next | forward backward update | next | ... | lap       data_wait_pct = 100 * sum(next) / (lap to lap)
        GPU   | next |queue| next      |queue|                          the host waits while the GPU still computes:
              |      |  step on the GPU  |idle|                         only the part of `next` in which it idles counts

    The clock starts before the first `next()`: a clock that starts when the batch has arrived cannot see a slow loader.
    Work queued on a GPU counts only if the caller has waited for it before `lap`.
    """

    def __init__(self, gpu: GpuTimeline | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._gpu = gpu
        self._start_s = clock()
        self._wait_s = 0.0
        self._num_samples = 0

    def next(self, loader: Iterator[T]) -> T:
        """The loader's next item."""
        begin_s = self._clock()
        item = next(loader)
        end_s = self._clock()
        if self._gpu:
            begin_s = max(begin_s, self._gpu.busy_until(end_s))
        self._wait_s += max(0.0, end_s - begin_s)
        return item

    def count(self, num_samples: int) -> None:
        """Add the samples of a step that is finished, or on a GPU queued, over all processes."""
        self._num_samples += num_samples
        if self._gpu:
            self._gpu.step_queued()

    def lap(self) -> dict[str, float]:
        """{"samples_per_s", "data_wait_pct"} since the last lap, and start a new one."""
        now_s = self._clock()
        elapsed_s = now_s - self._start_s
        rates = {
            "samples_per_s": self._num_samples / elapsed_s,
            "data_wait_pct": 100.0 * self._wait_s / elapsed_s,
        }
        self._start_s, self._wait_s, self._num_samples = now_s, 0.0, 0
        if self._gpu:
            self._gpu.restart()
        return rates
