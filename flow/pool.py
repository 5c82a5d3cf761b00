"""Work on many files in parallel, in processes that may die."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from types import FrameType, TracebackType
from typing import Self, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

_STOPS = (signal.SIGINT, signal.SIGTERM)

#: After which an exception that stops a command comes again.
_AGAIN_S = 2.0
#: After which it comes if a process was being started: half started it would end with a traceback. A mask does not keep
#: a signal from coming by way of another thread.
_SOON_S = 0.05

_worker_number = 0
_starting = False


def default_num_workers() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def worker_number() -> int:
    """Which worker of its pool this process is, from 0 on; 0 in a process of no pool."""
    return _worker_number


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt(signal), so that a command cleans up after both.

    It comes again and again until this is left: Python drops an exception that meets a callback of an import. Not while
    somebody cleans up after it, though, unless there is another signal.
    """
    came: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        again = number == signal.SIGALRM
        if not again:
            came.append(number)
        signal.setitimer(signal.ITIMER_REAL, _SOON_S if _starting else _AGAIN_S)
        if not _starting and not (again and _is_cleaning_up()):
            raise KeyboardInterrupt(came[0])

    before = {number: signal.getsignal(number) for number in (*_STOPS, signal.SIGALRM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # Ctrl-C in a job that was started in the background
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_cleaning_up() -> bool:
    """Whether the main thread is in an except, a finally or an __exit__ that an end by KeyboardInterrupt led to."""
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt | GeneratorExit):
        error = error.__context__
    return error is not None


def run_pool(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    num_workers: int,
    on_error: Callable[[Task, RuntimeError], Result] | None = None,
) -> Generator[tuple[Task, Result | None], None, None]:
    """Yield (task, function(task)) as they are done, in any order; None for a task whose process dies.

    A process that is killed, or crashes in a decoder, takes the whole pool with it. The tasks that were under way are
    then repeated one at a time, and only one whose process dies again is lost. Exceptions of `function` are raised.

    on_error: with it a RuntimeError is dealt with like a death, and what it makes of the second one is yielded. GPU
    libraries raise those, out of memory or because the device is lost, and the process may be of no use afterwards.

    Raises ChildProcessError if processes cannot be started. Closed, or left by an exception, it ends them at once.
    """
    todo = iter(tasks)
    # The former is one of the latter.
    faults = BrokenProcessPool if on_error is None else RuntimeError
    while True:
        with _Pool(num_workers) as pool:
            suspects = yield from _run_until_fault(pool, function, todo, num_workers, faults)
        if not suspects:
            return
        for task in suspects:
            yield task, run_alone(function, task, on_error)


def _run_until_fault(
    pool: "_Pool",
    function: Callable[[Task], Result],
    todo: Iterator[Task],
    num_workers: int,
    faults: type[RuntimeError],
) -> Generator[tuple[Task, Result], None, list[Task]]:
    """Yield (task, result) until all are done, or one ends with one of `faults`; returns the tasks to repeat."""
    running: dict[Future[Result], Task] = {}
    suspects: list[Task] = []
    while True:
        if not suspects:
            # Twice as many as processes: none waits while a result is dealt with.
            suspects += _submit(pool, function, islice(todo, 2 * num_workers - len(running)), running)
        if not running:
            return suspects
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task = running.pop(future)
            try:
                result = future.result()
            except faults:
                suspects.append(task)
            else:
                yield task, result


def _submit(
    pool: "_Pool",
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    running: dict[Future[Result], Task],
) -> list[Task]:
    """Submit tasks; returns those that a broken pool did not take."""
    refused = []
    for task in tasks:
        try:
            running[pool.start(function, task)] = task
        except BrokenProcessPool:
            refused.append(task)
    return refused


def run_alone(
    function: Callable[[Task], Result],
    task: Task,
    on_error: Callable[[Task, RuntimeError], Result] | None = None,
) -> Result | None:
    """function(task) in a process of its own; None if that dies. on_error: as in `run_pool`."""
    with _Pool(1) as pool:
        try:
            return pool.start(function, task).result()
        except BrokenProcessPool:
            return None
        except RuntimeError as error:
            if on_error is None:
                raise
            return on_error(task, error)


class _Pool(ProcessPoolExecutor):
    """Processes that end with this one, and at once if an exception leaves the pool. Entered, the first is there.

    The leash is a pipe whose one end only this process holds: it breaks when the process closes it, or dies.
    """

    def __init__(self, num_workers: int) -> None:
        context = multiprocessing.get_context("spawn")  # not fork: OpenCV's threads do not survive it
        self._end, self._leash = context.Pipe(duplex=False)
        super().__init__(num_workers, context, _start_worker, (context.Value("i", 0), self._end))

    def __enter__(self) -> Self:
        try:
            self.start(str, None).result()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            if not isinstance(error, BrokenProcessPool):
                raise
            raise ChildProcessError(
                "Worker processes die while they start. In a script, call this under `if __name__ == '__main__':`."
            ) from None
        return self

    def start(self, function: Callable[[Task], Result], task: Task) -> Future[Result]:
        """Submit function(task)."""
        global _starting
        # A process may be started for it, which inherits the mask: undisturbed, or it would end with a traceback.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        _starting = True
        try:
            return self.submit(function, task)
        finally:
            _starting = False
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._leash.close()
        self.shutdown(cancel_futures=True)
        self._leash.close()
        self._end.close()


def _start_worker(num_started: "Synchronized[int]", leash: Connection) -> None:
    """In a worker: take a number, end silently with Ctrl-C, and with the leash."""
    global _worker_number
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    with num_started.get_lock():
        _worker_number = num_started.value
        num_started.value += 1

    def watch() -> None:
        leash.poll(None)
        os._exit(1)

    # Without this a worker outlives a parent that was killed, and waits for tasks for ever.
    threading.Thread(target=watch, daemon=True).start()
