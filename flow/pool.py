"""Work on many files in parallel, in processes that may die."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.sharedctypes import Synchronized
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

_worker_number = 0


def default_num_workers() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def worker_number() -> int:
    """Which worker of its pool this process is, from 0 on; 0 in a process of no pool."""
    return _worker_number


def run_pool(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    num_workers: int,
    on_error: Callable[[Task, RuntimeError], Result] | None = None,
) -> Iterator[tuple[Task, Result | None]]:
    """Yield (task, function(task)) as they are done, in any order; None for a task whose process dies.

    A process that is killed, or crashes in a decoder, takes the whole pool with it. The tasks that were under way are
    then repeated one at a time, and only one whose process dies again is lost. Exceptions of `function` are raised.

    on_error: with it a RuntimeError is dealt with like a death, and what it makes of the second one is yielded. GPU
    libraries raise those, out of memory or because the device is lost, and the process may be of no use afterwards.
    """
    todo = iter(tasks)
    running: dict[Future[Result], Task] = {}
    suspects: list[Task] = []
    # The former is one of the latter.
    faults = BrokenProcessPool if on_error is None else RuntimeError
    pool = _new_pool(num_workers)
    try:
        while True:
            if not suspects:
                # Twice as many as processes: none waits while a result is dealt with.
                suspects += _submit(pool, function, islice(todo, 2 * num_workers - len(running)), running)
            if not running and not suspects:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                try:
                    result = future.result()
                except faults:
                    suspects.append(task)
                else:
                    yield task, result
            if suspects and not running:
                pool.shutdown()
                for task in suspects:
                    yield task, run_alone(function, task, on_error)
                suspects.clear()
                pool = _new_pool(num_workers)
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(
    pool: ProcessPoolExecutor,
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    running: dict[Future[Result], Task],
) -> list[Task]:
    """Submit tasks; returns those that a broken pool did not take."""
    refused = []
    for task in tasks:
        try:
            running[pool.submit(function, task)] = task
        except BrokenProcessPool:
            refused.append(task)
    return refused


def run_alone(
    function: Callable[[Task], Result],
    task: Task,
    on_error: Callable[[Task, RuntimeError], Result] | None = None,
) -> Result | None:
    """function(task) in a process of its own; None if that dies. on_error: as in `run_pool`."""
    with _new_pool(1) as pool:
        try:
            return pool.submit(function, task).result()
        except BrokenProcessPool:
            return None
        except RuntimeError as error:
            if on_error is None:
                raise
            return on_error(task, error)


def _new_pool(num_workers: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # not fork: OpenCV's threads do not survive it
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, (context.Value("i", 0),))
    try:
        pool.submit(os.getpid).result()
    except BrokenProcessPool:
        raise RuntimeError(
            "Worker processes die while they start. In a script, call this under `if __name__ == '__main__':`."
        ) from None
    return pool


def _start_worker(num_started: "Synchronized[int]") -> None:
    """In a worker: take a number, and end with the parent."""
    global _worker_number
    with num_started.get_lock():
        _worker_number = num_started.value
        num_started.value += 1
    _die_with_parent()


def _die_with_parent() -> None:
    """Without this a worker outlives a parent that was killed, and waits for tasks for ever."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
