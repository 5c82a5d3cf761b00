"""Threads that read ahead what the batches need."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import numpy as np

from loaders.damage import Replacements, read_request
from loaders.request import Request
from loaders.source import Encoded, Source

#: Batches that are read and checked ahead of the graph's own queue, and the threads that do it.
_READ_AHEAD = 4
_READERS = 2
#: A read takes milliseconds: a thread that is not back by then hangs, and nobody waits for it any longer.
_PATIENCE_S = 1.0

_Read = Future[tuple[Request, Encoded]]
_Tasks = SimpleQueue[tuple[_Read, Callable[[], Any]] | None]


class Reader:
    """Requests with their bytes, in order, read ahead by threads. What is taken is valid until `source.release`.

    timeout_s: longest wait for a request's bytes.
    replacements: of damaged samples; without, damage is an error.
    """

    def __init__(
        self,
        source: Source,
        requests: Iterator[Request],
        *,
        timeout_s: float = 300.0,
        replacements: Replacements | None = None,
    ):
        self.source = source
        self._requests = requests
        self._timeout_s = timeout_s
        self._replacements = replacements
        self._threads = _Threads(_READERS)
        self._ahead: deque[tuple[Request, _Read]] = deque()
        self._failed = False

    def take(self) -> tuple[Request, Encoded]:
        """The next request and its bytes.

        Raises StopIteration at the end; SampleError for a damaged member, ShardError for too many; TimeoutError, which
        names what was waited for; OSError. After an error the same request is next again, and read anew.
        """
        if self._failed:  # what is wrong may have been put right since, and be what others were read before
            self._failed = False
            self._ahead = deque((request, self._start(request)) for request, _ in self._ahead)
        while len(self._ahead) <= _READ_AHEAD and (request := next(self._requests, None)) is not None:
            self._ahead.append((request, self._start(request)))
        if not self._ahead:
            raise StopIteration
        request, read = self._ahead[0]
        if not wait([read], self._timeout_s).done:
            place = "server" if self.source.index.cache else "file system"
            raise TimeoutError(
                f"Waited {self._timeout_s:g} s for {self.source.waits() or 'a thread that reads'}. Is its {place} "
                "there? A run goes on from its last checkpoint; train.timeout_s sets a longer wait, as a first pass "
                "over a set in a store may need."
            )
        try:
            request, encoded = read.result()
        except Exception:
            self._failed = True
            raise
        self._ahead.popleft()
        if self._replacements:
            taken = self._replacements.taken(request)
            assert np.array_equal(taken.video, request.video) and np.array_equal(taken.tau, request.tau)
            request = taken  # of windows, with what has replaced earlier ones
        return request, encoded

    def put_back(self, requests: Sequence[Request]) -> None:
        """These requests, which have been taken, in this order, are next again."""
        self._ahead.extendleft(reversed([(request, self._start(request)) for request in requests]))

    def _start(self, request: Request) -> _Read:
        return self._threads.submit(lambda: read_request(self.source, request, self._replacements))

    def close(self) -> None:
        """Stop the threads and close the shards; a shard that a thread still waits for stays open."""
        self._requests = iter(())
        self.source.stop()  # or a thread that meets damage would go on looking for other samples
        if self._threads.stop():
            self.source.close()
        self._ahead.clear()


class _Threads:
    """Threads that do not keep a process from ending: those of `concurrent.futures` are waited for then, and one that
    hangs in a dead file system never comes back."""

    def __init__(self, count: int):
        self._tasks: _Tasks = SimpleQueue()
        self._threads = [
            Thread(target=_work, args=(self._tasks,), name=f"loader-read-{i}", daemon=True) for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[[], Any]) -> _Read:
        future: _Read = Future()
        self._tasks.put((future, function))
        return future

    def stop(self) -> bool:
        """Do what is begun, and nothing more. Returns whether all threads have ended."""
        with suppress(Empty):
            while True:
                self._tasks.get_nowait()
        self._let_go()
        for thread in self._threads:
            thread.join(_PATIENCE_S)
        return not any(thread.is_alive() for thread in self._threads)

    def _let_go(self) -> None:
        for _ in self._threads:
            self._tasks.put(None)

    __del__ = _let_go


def _work(tasks: _Tasks) -> None:
    while (task := tasks.get()) is not None:
        future, function = task
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
        del task, future, function  # a thread that waits for its next task would keep a batch alive
