"""The meter sees the wait for data, and all of it."""

import pytest

from train.meter import Meter


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


def test_wait_is_measured_around_next_against_the_whole_step():
    clock = Clock()

    def loader():
        while True:
            clock.now_s += 3  # waits for data
            yield "batch"

    meter, batches = Meter(clock), loader()
    for _ in range(2):
        assert meter.next(batches) == "batch"
        clock.now_s += 1  # computes
        meter.count(16)
    assert meter.lap() == pytest.approx({"samples_per_s": 32 / 8, "data_wait_pct": 75.0})
    clock.now_s += 5
    meter.count(10)
    assert meter.lap() == pytest.approx({"samples_per_s": 2.0, "data_wait_pct": 0.0})


def test_the_end_of_a_loader_is_passed_on():
    with pytest.raises(StopIteration):
        Meter().next(iter([]))
