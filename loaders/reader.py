"""Which bytes each batch needs, and threads that read them ahead."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from loaders.batch import StreamSpec
from loaders.draw import Draw, Ints
from loaders.source import Encoded, Source
from loaders.windows import NewWindows, plan_windows

#: Batches that are read and checked ahead of the graph's own queue, and the threads that do it.
_READ_AHEAD = 4
_READERS = 2


@dataclass(frozen=True)
class Request:
    """A batch to make: its draw, the runs (video, tau) of `steps` time steps to decode, and new windows if any."""

    draw: Draw
    video: Ints
    tau: Ints
    steps: int
    new: NewWindows | None = None


def requests(draws: Iterator[Draw], spec: StreamSpec, start_step: int, views: bool) -> Iterator[Request]:
    """What to decode for each batch: the samples themselves, or the windows that they share."""
    if views or spec.stacks_per_window == 1:
        for draw in draws:
            yield Request(draw, draw.video, draw.tau, spec.steps)
    else:
        for draw, new in plan_windows(draws, start_step, spec):
            yield Request(draw, new.video, new.first, spec.window_steps, new)


class Reader:
    """Requests with their bytes, in order, read ahead by threads. What is taken is valid until `source.release`."""

    def __init__(self, source: Source, requests: Iterator[Request]):
        self.source = source
        self._requests = requests
        self._threads = ThreadPoolExecutor(_READERS, thread_name_prefix="loader-read")
        self._ahead: deque[tuple[Request, Future[Encoded]]] = deque()

    def take(self) -> tuple[Request, Encoded]:
        """The next request and its bytes. Raises StopIteration at the end, ShardError for a damaged member."""
        while len(self._ahead) <= _READ_AHEAD and (request := next(self._requests, None)) is not None:
            read = self._threads.submit(self.source.read, request.video, request.tau, request.steps)
            self._ahead.append((request, read))
        if not self._ahead:
            raise StopIteration
        request, read = self._ahead.popleft()
        return request, read.result()

    def close(self) -> None:
        """Stop the threads and close the shards."""
        self._requests = iter(())
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
        self.source.close()
