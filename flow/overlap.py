"""Two stages of a stream at once: the first runs in a thread, a bounded number of items ahead of the second."""

import queue
import threading
from collections.abc import Generator
from contextlib import closing, suppress
from typing import TypeVar

Item = TypeVar("Item")


class _End(Exception):
    """There are no more items."""


def ahead(items: Generator[Item, None, None], depth: int = 1) -> Generator[Item, None, None]:
    """Yield what `items` yields, in its order, while a thread computes the next ones.

        items      0  1  2  3        computed by the thread
        caller        0  1  2  3     depth = 1: while the caller deals with 1, 2 is computed, and waits if it is early

    At most depth + 1 items wait. An exception of `items` is raised here, after the items before it. No thread outlives
    the iteration: whoever stops before the end closes it (`contextlib.closing`), which waits for the item in work.
    """
    waiting: queue.Queue[tuple[list[Item], BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def work() -> None:
        end: BaseException = _End()
        try:
            with closing(items):
                for item in items:
                    waiting.put(([item], None))
                    if stopped.is_set():
                        return
        except BaseException as error:
            end = error
        waiting.put(([], end))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, end = waiting.get()
            if isinstance(end, _End):
                return
            if end is not None:
                raise end
            yield from item
    finally:
        stopped.set()
        with suppress(queue.Empty):
            while True:
                waiting.get_nowait()  # a thread that waits for room has it now, and then sees that it is to stop
        thread.join()
