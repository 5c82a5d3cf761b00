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

    meter, batches = Meter(clock=clock), loader()
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


class Gpu:
    """Computes for 10 s a step from the moment it is queued, or from when it is free."""

    def __init__(self, clock):
        self.clock, self.free_s = clock, clock.now_s

    def step_queued(self):
        self.free_s = max(self.free_s, self.clock.now_s) + 10

    def busy_until(self, now_s):
        return min(self.free_s, now_s)

    def restart(self):
        self.clock.now_s = max(self.clock.now_s, self.free_s)


@pytest.mark.parametrize("load_s, idle_s", [(4, 0), (10, 0), (13, 3)])
def test_on_a_gpu_only_idling_is_a_wait(load_s, idle_s):
    """A loader that is slower than the host's queueing but faster than the GPU does not starve it."""
    clock = Clock()

    def loader():
        while True:
            clock.now_s += load_s
            yield "batch"

    gpu = Gpu(clock)
    meter, batches = Meter(gpu, clock), loader()
    meter.next(batches)  # the first batch is waited for in any case
    meter.count(1)
    meter.lap()
    num_steps = 50
    for _ in range(num_steps):
        meter.next(batches)
        meter.count(1)
    gpu.restart()
    lap = meter.lap()
    # the first of these waits began with an idle GPU
    expected_s = load_s + (num_steps - 1) * idle_s
    elapsed_s = num_steps / lap["samples_per_s"]
    assert lap["data_wait_pct"] == pytest.approx(100 * expected_s / elapsed_s)


@pytest.mark.gpu
def test_gpu_events_tell_when_the_gpu_was_free():
    import time

    import torch

    from train.meter import GpuTimeline

    gpu = GpuTimeline()
    matrix = torch.randn(8192, 8192, device="cuda")
    for _ in range(20):
        matrix @ matrix
    gpu.step_queued()
    now_s = time.perf_counter()
    assert gpu.busy_until(now_s) == now_s  # still computing
    torch.cuda.synchronize()
    done_s = time.perf_counter()
    time.sleep(0.2)
    assert abs(gpu.busy_until(time.perf_counter()) - done_s) < 0.1
