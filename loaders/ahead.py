"""Shards fetched ahead of need, for sets that are read through a cache; sets in folders pay nothing for it.

requests ─ ahead ─ Reader ─ Source.read ─ index.open_shard        what is not there then is waited for
             └─ ask: later ─┐     └─ ask: now ─┐
                            └─ Fetcher's threads ─ ShardCache.fetch
"""

import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from queue import PriorityQueue
from typing import TypeAlias

import numpy as np

from loaders.index import Index
from loaders.request import Request

logger = logging.getLogger(__name__)

#: Requests whose shards are asked for ahead of need.
_AHEAD = 32
#: Part of the cache that those shards may take: what is read now must stay there too.
_PART_AHEAD = 0.75
#: Shards of a process that are fetched at a time.
_THREADS = 4
#: A thread that waits for a server ends with the process: it is not waited for any longer.
_PATIENCE_S = 1.0

_NOW, _LATER = 1, 2
_Task: TypeAlias = "tuple[int, int, int]"


class Fetcher:
    """Threads that fetch shards into an index's cache, those needed now before those needed later."""

    def __init__(self, index: Index):
        assert index.cache is not None
        self._cache, self._names = index.cache, index.shards
        self._tasks: PriorityQueue[_Task] = PriorityQueue()
        self._count = itertools.count()
        self._asked: dict[int, int] = {}  # shard -> how urgently
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._stopped = False

    def ask(self, shards: list[int], *, now: bool) -> None:
        """Have shards fetched that are not there, in this order; those that are count as used."""
        urgency = _NOW if now else _LATER
        for shard in shards:
            if not self._cache.touch(self._names[shard]) and self._asked.get(shard, 9) > urgency:
                self._asked[shard] = urgency
                self._tasks.put((urgency, next(self._count), shard))
                self._start()

    def _start(self) -> None:
        with self._lock:
            if not self._threads and not self._stopped:
                self._threads = [
                    threading.Thread(target=self._work, name=f"loader-fetch-{i}", daemon=True) for i in range(_THREADS)
                ]
                for thread in self._threads:
                    thread.start()

    def _work(self) -> None:
        while True:
            _, _, shard = self._tasks.get()
            if self._stopped:
                return
            try:
                self._cache.fetch(self._names[shard], lambda: self._stopped)
            except Exception as error:  # whoever needs it will meet the same, and say so
                logger.debug("%s: %s", self._names[shard], error)
            finally:
                self._asked.pop(shard, None)

    def stop(self) -> None:
        """Begin nothing more, and end what is begun after the piece that is being read; it will go on from there."""
        with self._lock:
            self._stopped = True
        for _ in self._threads:
            self._tasks.put((0, next(self._count), 0))

    def close(self) -> None:
        """Stop, and wait for the threads, but not for long."""
        self.stop()
        until = time.monotonic() + _PATIENCE_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    __del__ = stop


def ahead(requests: Iterator[Request], index: Index, ask: Callable[[list[int]], None]) -> Iterator[Request]:
    """The same requests. The shards of those that come are asked for while earlier ones are read, as many as the
    cache holds."""
    if index.cache is None:
        return requests
    return _ahead(requests, index, ask, int(_PART_AHEAD * index.cache.max_bytes))


def _ahead(
    requests: Iterator[Request], index: Index, ask: Callable[[list[int]], None], max_bytes: int
) -> Iterator[Request]:
    waiting: deque[tuple[Request, list[int]]] = deque()
    uses: Counter[int] = Counter()  # of shards, by the requests that wait
    num_bytes = 0
    more = True
    while True:
        while more and len(waiting) <= _AHEAD and (num_bytes < max_bytes or not waiting):
            if (request := next(requests, None)) is None:
                more = False
                break
            shards = np.unique(index.shard[request.video]).tolist()
            new = [shard for shard in shards if not uses[shard]]
            num_bytes += sum(index.shard_bytes[shard] for shard in new)
            uses.update(shards)
            ask(new)
            waiting.append((request, shards))
        if not waiting:
            return
        request, shards = waiting.popleft()
        uses.subtract(shards)
        num_bytes -= sum(index.shard_bytes[shard] for shard in shards if not uses[shard])
        yield request
