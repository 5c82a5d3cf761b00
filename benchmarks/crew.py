"""One process per core, or per GPU, that do the same work at the same time when they are told to, as packing does."""

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

#: Makes a process's work: called with the process's number; yields what the work is, a dict, once it is ready to go,
#: then, for ever, how many pairs it has just done.
Work = Callable[[int], Iterator[Any]]

#: How long a process may take to end by itself.
END_S = 2.0


class CrewError(RuntimeError):
    """A process failed or died. The message names the crew."""


@dataclass(frozen=True)
class Turn:
    """What all processes did in one turn. cpu_s_per_pair: of them, in user and system. cpu_share: of their time."""

    pairs_per_s: float
    cpu_s_per_pair: float
    cpu_share: float


def add_up(done: Sequence[tuple[int, float, float]]) -> Turn:
    """A turn from every process's pairs, and the wall-clock and CPU seconds that they took."""
    pairs, elapsed_s, cpu_s = (sum(column) for column in zip(*done, strict=True))
    return Turn(sum(count / own_s for count, own_s, _ in done), cpu_s / pairs, cpu_s / elapsed_s)


class Crew:
    """Processes with the same work, which start at once, alone or beside other crews. `wait` until they are ready, then
    `measure`; between turns they stand still."""

    def __init__(self, name: str, works: Sequence[Work]):
        self.name = name
        self._members: list[tuple[Any, Any]] = []
        context = multiprocessing.get_context("spawn")
        for number, work in enumerate(works):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work, number), daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))

    def __len__(self) -> int:
        return len(self._members)

    def wait(self) -> Any:
        """What the first process's work says of itself, when all are ready. Raises CrewError."""
        return self._receive()[0]

    def measure(self, seconds: float) -> Turn:
        """Work for about so many seconds, to the end of the step that is under way then. Raises CrewError."""
        for _, pipe in self._members:
            with suppress(BrokenPipeError):  # told below
                pipe.send(seconds)
        return add_up(self._receive())

    def _receive(self) -> list[Any]:
        answers = []
        for process, pipe in self._members:
            try:
                answers.append(pipe.recv())
            except EOFError:
                process.join()
                raise CrewError(f"{self.name}: a process died with exit code {process.exitcode}.") from None
            if isinstance(answers[-1], str):
                raise CrewError(f"{self.name}: {answers[-1]}")
        return answers

    def close(self) -> None:
        """End the processes, those in a long step by force."""
        for _, pipe in self._members:
            pipe.close()
        for process, _ in self._members:
            process.join(END_S)
            process.kill()
            process.join()


def _serve(pipe: Any, work: Work, number: int) -> None:
    """In a process: what the work is, then an answer to every request for so many seconds."""
    try:
        steps = work(number)
        pipe.send(next(steps))
        while True:
            seconds = pipe.recv()
            pairs, start, cpu = 0, time.perf_counter(), time.process_time()
            while time.perf_counter() - start < seconds:
                pairs += next(steps)
            pipe.send((pairs, time.perf_counter() - start, time.process_time() - cpu))
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone
    except Exception as error:
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {error}")
