"""flow.overlap: the same items in the same order, computed ahead but not far, and no thread left behind."""

import threading
import time

import pytest

from flow.overlap import ahead


def wait_until(holds):
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Source:
    """Numbers 0 .. count-1, then perhaps an error; notes what happened to it."""

    def __init__(self, count, error=None):
        self.count, self.error = count, error
        self.made, self.threads, self.closed = 0, set(), False

    def __call__(self):
        try:
            for number in range(self.count):
                self.threads.add(threading.current_thread())
                self.made += 1
                yield number
            if self.error:
                raise self.error
        finally:
            self.closed = True

    def left(self):
        """Threads of this source that still live."""
        return [thread for thread in self.threads if thread.is_alive()]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_items_come_in_order_from_another_thread(count):
    source = Source(count)
    assert list(ahead(source())) == list(range(count))
    assert threading.current_thread() not in source.threads and len(source.threads) == min(count, 1)
    assert source.closed and not source.left()


@pytest.mark.parametrize("depth", [1, 3])
def test_work_goes_on_meanwhile_but_not_far(depth):
    source = Source(50)
    items = ahead(source(), depth)
    for number in range(10):
        assert next(items) == number
        # The one in hand, those that wait, and one that waits for room.
        wait_until(lambda: source.made == number + depth + 2)  # noqa: B023
    time.sleep(0.05)
    assert source.made == 9 + depth + 2
    items.close()


def test_an_error_comes_after_the_items_before_it():
    source, seen = Source(3, RuntimeError("device lost")), []
    with pytest.raises(RuntimeError, match="device lost"):
        for number in ahead(source(), 2):
            seen.append(number)
    assert seen == [0, 1, 2] and source.closed and not source.left()


@pytest.mark.parametrize("taken", [1, 2, 5])
@pytest.mark.parametrize("depth", [1, 2])
def test_who_stops_leaves_no_thread(taken, depth):
    for _ in range(20):  # the thread may be anywhere
        source = Source(6)
        items = ahead(source(), depth)
        for _ in range(taken):
            next(items)
        items.close()
        assert source.closed and not source.left()
