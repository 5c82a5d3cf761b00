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

from loaders.cache import ShardCache
from loaders.index import Index
from loaders.request import Request

logger = logging.getLogger(__name__)

#: Requests whose shards are asked for ahead of need.
AHEAD = 32
#: Part of the cache, less the set's index and lists, that those shards may take: what is read now must stay there too.
_PART_AHEAD = 0.75
#: Shards of a process that are fetched at a time, and of those ahead of need that may be missing: each process of a
#: machine fetches into the same cache.
_THREADS = 4
_MOST_MISSING = 8
#: A thread that waits for a server ends with the process: it is not waited for any longer.
_PATIENCE_S = 1.0
#: Requests after which those shards are asked for again; in a cache that does not hold the set also when one is left.
_AGAIN = 8

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
        self._there: set[int] = set()  # when they were last looked for
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def ask(self, shards: list[int], *, now: bool) -> list[int]:
        """Have shards fetched that are not there, in this order; those that are count as used, the first one last.
        Returns those that are not there.

        now: those that were there when they were last asked for are not looked for again: most are, and whoever reads
        one that was taken away since waits for it.
        """
        urgency = _NOW if now else _LATER
        unsure = [shard for shard in shards if shard not in self._there] if now else shards
        there = {shard for shard in reversed(unsure) if self._cache.touch(self._names[shard])}
        missing = [shard for shard in unsure if shard not in there]
        self._there.update(there)
        self._there.difference_update(missing)
        for shard in missing:
            if self._asked.get(shard, 9) > urgency:
                self._asked[shard] = urgency
                self._tasks.put((urgency, next(self._count), shard))
                self._start()
        return missing

    def _start(self) -> None:
        with self._lock:
            if not self._threads and not self._stopped.is_set():
                means = (self._tasks, self._cache, self._names, self._asked, self._stopped)
                self._threads = [
                    threading.Thread(target=_work, args=means, name=f"loader-fetch-{i}", daemon=True)
                    for i in range(_THREADS)
                ]
                for thread in self._threads:
                    thread.start()

    def stop(self) -> None:
        """Begin nothing more, and end what is begun after the piece that is being read; it will go on from there."""
        with self._lock:
            self._stopped.set()
        for _ in self._threads:
            self._tasks.put((0, next(self._count), 0))

    def close(self) -> None:
        """Stop, and wait for the threads, but not for long."""
        self.stop()
        until = time.monotonic() + _PATIENCE_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    __del__ = stop


def _work(
    tasks: PriorityQueue[_Task], cache: ShardCache, names: list[str], asked: dict[int, int], stopped: threading.Event
) -> None:
    """What a thread does. It knows nothing of the Fetcher, which ends it when nobody needs it any more."""
    while True:
        _, _, shard = tasks.get()
        if stopped.is_set():
            return
        try:
            cache.fetch(names[shard], stopped.is_set)
        except Exception as error:  # whoever needs it will meet the same, and say so
            logger.debug("%s: %s", names[shard], error)
        finally:
            asked.pop(shard, None)


def ahead(requests: Iterator[Request], index: Index, ask: Callable[[list[int]], list[int]]) -> Iterator[Request]:
    """The same requests. While earlier ones are read, the shards of those that come are asked for, as many as the
    cache holds, and asked for again, in a cache that does not hold the set whenever a shard is left: or those that were
    read last, and are needed no more, would stay there longer than those that were fetched ahead of need.

    ask: called with shards, those needed next first. Returns those that are not there.
    """
    if index.cache is None:
        return requests
    for_shards = index.cache.max_bytes - index.cache.own_bytes
    return _ahead(requests, index, ask, int(_PART_AHEAD * for_shards))


def _ahead(
    requests: Iterator[Request], index: Index, ask: Callable[[list[int]], list[int]], max_bytes: int
) -> Iterator[Request]:
    waiting: deque[tuple[Request, list[int]]] = deque()
    uses: Counter[int] = Counter()  # of shards, by the requests that wait
    num_bytes = 0
    # Then each shard that is fetched takes another one's place, and one that was just left has to be older than all
    # that wait. A cache that holds the set takes nothing away, and that would be work for each batch.
    tight, left = sum(index.shard_bytes) > max_bytes, False
    more = True
    missing: list[int] = []
    for number in itertools.count():
        if (tight and left) or number % _AGAIN == 0:
            missing = list(dict.fromkeys(shard for _, shards in waiting for shard in shards))
        missing = ask(missing)
        while more and len(waiting) <= AHEAD:
            if waiting and (num_bytes >= max_bytes or len(missing) >= _MOST_MISSING):
                break
            if (request := next(requests, None)) is None:
                more = False
                break
            shards = np.unique(index.shard[request.video]).tolist()
            new = [shard for shard in shards if not uses[shard]]
            num_bytes += sum(index.shard_bytes[shard] for shard in new)
            uses.update(shards)
            missing = missing + ask(new)
            waiting.append((request, shards))
        if not waiting:
            return
        request, shards = waiting.popleft()
        uses.subtract(shards)
        gone = [shard for shard in shards if not uses[shard]]
        left = bool(gone)
        num_bytes -= sum(index.shard_bytes[shard] for shard in gone)
        yield request
