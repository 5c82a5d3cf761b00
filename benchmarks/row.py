"""A row of a benchmark: a loader in a process of its own that runs when it is told to, and what it used meanwhile.

Between its turns a row is stopped (SIGSTOP), workers included: a queue that fills while other rows are measured would
take their cores, and be counted as this row's speed afterwards.
"""

import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import common  # noqa: F401  (puts the checkout on the path)
import numpy as np
import psutil
import torch

from loaders.batch import StreamSpec
from loaders.draw import Draw

#: Batches taken before the clock starts; and where pages were evicted, those that had been read ahead before that.
WARM_UP, READ_AHEAD = 3, 8
#: Samples of the last batch of every turn that are handed out to be checked.
NUM_CHECKED = 4


@dataclass(frozen=True)
class Job:
    """What a row is to deliver, and with what means.

    root: folder of the packed set; split: list of videos that training draws from.
    loose: folder with the members as files, of `peers.write_loose_files`.
    cores: threads, for rows that work with threads. workers: worker processes, for those that work with processes.
    region: decode only the crop, where a row has the choice.
    cold: evict the shards' pages before the clock starts.
    url, cache: the set's place behind a server, and the folder it is cached in, for rows that read it from there.
    """

    root: Path
    split: str
    loose: Path
    spec: StreamSpec
    batch_size: int
    cores: int
    device: str = "cpu"
    seed: int = 0
    workers: int = 0
    region: bool = False
    cold: bool = False
    url: str = ""
    cache: Path = Path()


class Delivered(NamedTuple):
    """A batch: inputs (n, C, crop, crop) float32 on the device, and what tells the n views that were cut for it.

    draw: called outside the clock and before the next batch, for some batches only: nobody else pays for the report.
    """

    inputs: Any
    draw: Callable[[], Draw]


class Checked(NamedTuple):
    """Some samples of a batch: inputs (n, C, crop, crop), and the views that they are said to be."""

    inputs: np.ndarray
    draw: Draw


#: Makes a row's endless iterator over batches; a ceiling delivers nothing, None.
Maker = Callable[[Job], Iterator[Delivered | None]]


@dataclass(frozen=True)
class Measured:
    """One turn of a row. CPU and reads are those of its whole process tree; None where the system does not tell.

    peak_rss_bytes: resident memory at its highest since the row's start, summed over the tree; pages that its processes
    share count for each.
    checked: some samples of the last batch; None for ceilings.
    """

    samples_per_s: float
    cpu_s_per_1000: float
    peak_rss_bytes: int | None
    read_bytes_per_sample: float | None
    checked: Checked | None


class RowError(RuntimeError):
    """A row's process failed or died, or delivers something else than it says. The message names the row."""


class RowProcess:
    """A row's process. It starts at once, alone or beside others; `wait` until it has delivered, then `measure`."""

    def __init__(self, name: str, make: Maker, job: Job):
        self.name = name
        context = multiprocessing.get_context("forkserver")  # what every row imports is imported once
        context.set_forkserver_preload(["cv2", "torch"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, job), name=name)
        self._process.start()
        theirs.close()
        self._tree = [psutil.Process(self._process.pid)]

    def wait(self) -> None:
        """Until the first batch is there; then the row stands still. Raises RowError."""
        self._receive()
        self._stop()

    def measure(self, seconds: float) -> Measured:
        """Run for about so many seconds, after a warm-up. Raises RowError."""
        for process in reversed(self._tree):
            with suppress(psutil.NoSuchProcess):
                process.resume()
        with suppress(BrokenPipeError):  # told below
            self._pipe.send(seconds)
        measured = self._receive()
        self._stop()
        return measured

    def _receive(self) -> Any:
        while self._process.is_alive() and not self._pipe.poll(0.2):
            pass  # not the pipe's end alone tells of a death: the row's own workers hold it, too
        answer = None
        with suppress(EOFError):
            if self._pipe.poll():
                answer = self._pipe.recv()
        if answer is None:
            self._process.join()
            raise RowError(
                f"row {self.name}: its process died with exit code {self._process.exitcode}. Leave it out with --rows, "
                "or lower --batch-size if memory ran out."
            )
        if isinstance(answer, str):
            raise RowError(f"row {self.name} failed:\n{answer}")
        return answer

    def _stop(self) -> None:
        with suppress(psutil.NoSuchProcess):
            self._tree[0].suspend()  # first, so that it starts no more children
            self._tree[1:] = self._tree[0].children(recursive=True)
        for process in self._tree[1:]:
            with suppress(psutil.NoSuchProcess):
                process.suspend()

    def close(self) -> None:
        """End the row's processes, also those that stand still, hang, or outlived the one that started them."""
        self._stop()
        for process in self._tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Any, make: Maker, job: Job) -> None:
    """In the row's process: a word when the first batch is there, then an answer to every request."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    multiprocessing.set_start_method("fork", force=True)  # for a row's own workers; here it would be "forkserver"
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores, to try them
    try:
        batches = make(job)
        next(batches)
        pipe.send(True)
        while True:
            pipe.send(_measure(batches, job, pipe.recv()))
    except EOFError:
        pass  # the parent is gone
    except Exception:
        pipe.send(traceback.format_exc())


def _measure(batches: Iterator[Delivered | None], job: Job, seconds: float) -> Measured:
    """One turn. Worker processes deliver in turn and in bursts: the clock runs for whole rounds of theirs."""
    stride, count, batch = max(job.workers, 1), 0, None
    if job.cold:
        evict(job.root)
    for _ in range(max(READ_AHEAD if job.cold else WARM_UP, stride)):
        next(batches)
    _synchronize(job)
    before, start = _counters(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(stride):
            batch = next(batches)
        count += stride
    _synchronize(job)
    elapsed, after = time.perf_counter() - start, _counters()
    if job.cold:
        read_through(job.root)  # other rows find the pages again
    num_samples = count * job.batch_size
    cpu_s, read_bytes = (_increase(before, after, key) for key in ("cpu_s", "read_bytes"))
    peaks = [counters["peak_rss_bytes"] for counters in after.values()]
    return Measured(
        samples_per_s=num_samples / elapsed,
        cpu_s_per_1000=1000 * cpu_s / num_samples,
        peak_rss_bytes=None if None in peaks else sum(peaks),
        read_bytes_per_sample=None if read_bytes is None else read_bytes / num_samples,
        checked=None if batch is None else _some_of(batch),
    )


def _synchronize(job: Job) -> None:
    if job.device == "cuda":
        torch.cuda.synchronize()


def _some_of(batch: Delivered) -> Checked:
    """NUM_CHECKED samples of a batch, the first and the last among them."""
    chosen = np.unique(np.linspace(0, len(batch.inputs) - 1, NUM_CHECKED).astype(int))
    inputs = batch.inputs[torch.from_numpy(chosen).to(batch.inputs.device)].cpu().numpy()
    return Checked(inputs, batch.draw().take(chosen))


def _counters() -> dict[int, dict[str, Any]]:
    """What this process and each of its descendants used since its start, by process id."""
    myself = psutil.Process()
    found = {}
    for process in [myself, *myself.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        found[process.pid] = {
            "cpu_s": times.user + times.system,
            "read_bytes": _proc(process.pid, "io", "rchar:"),
            "peak_rss_bytes": _proc(process.pid, "status", "VmHWM:", 1024),
        }
    return found


def _proc(pid: int, file: str, key: str, unit: int = 1) -> int | None:
    """A figure of /proc/PID/file; None where there is none, or it is not ours to read."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * unit for line in lines if line.startswith(key)), None)


def _increase(before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]], key: str) -> Any:
    """Sum over all processes of how much a counter grew; None if one is unknown."""
    values = [(counters[key], before.get(pid, {}).get(key, 0)) for pid, counters in after.items()]
    return None if any(None in pair for pair in values) else sum(new - old for new, old in values)


def evict(root: Path) -> None:
    """Drop the shards' pages from the page cache."""
    for shard in sorted(root.glob("*.tar")):
        descriptor = os.open(shard, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_through(root: Path) -> None:
    """Read all shards once, so that their pages are cached as far as memory allows."""
    for shard in sorted(root.glob("*.tar")):
        with open(shard, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
