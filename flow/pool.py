"""Work on many files in parallel, in processes that may die."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def default_num_workers() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def run_pool(
    function: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int
) -> Iterator[tuple[Task, Result | None]]:
    """Yield (task, function(task)) as they are done, in any order; None for a task whose process dies.

    A process that is killed, or crashes in a decoder, takes the whole pool with it. The tasks that were under way are
    then repeated one at a time, and only one whose process dies again is lost. Exceptions of `function` are raised.
    """
    todo = iter(tasks)
    running: dict[Future[Result], Task] = {}
    pool = _new_pool(num_workers)
    try:
        while True:
            # Twice as many as processes: none waits while a result is dealt with.
            suspects = _submit(pool, function, islice(todo, 2 * num_workers - len(running)), running)
            if not running and not suspects:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                task = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    suspects.append(task)
                else:
                    yield task, result
            if suspects:
                suspects += running.values()
                running.clear()
                pool.shutdown()
                for task in suspects:
                    yield task, _run_alone(function, task)
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


def _run_alone(function: Callable[[Task], Result], task: Task) -> Result | None:
    with _new_pool(1) as pool:
        try:
            return pool.submit(function, task).result()
        except BrokenProcessPool:
            return None


def _new_pool(num_workers: int) -> ProcessPoolExecutor:
    # Not fork: OpenCV's threads do not survive it.
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _die_with_parent)
    try:
        pool.submit(os.getpid).result()
    except BrokenProcessPool:
        raise RuntimeError(
            "Worker processes die while they start. In a script, call this under `if __name__ == '__main__':`."
        ) from None
    return pool


def _die_with_parent() -> None:
    """In a worker: without this it outlives a parent that was killed, and waits for tasks for ever."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
