"""Between Python and a running DALI graph: what goes in lives until it is done, what comes out until it is read."""

import ctypes
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy.typing as npt
import torch

from loaders.pipeline import QUEUE_DEPTH


class FedGraph:
    """A DALI graph fed by a function, and what it was fed for each batch that is still inside.

    make(feed) builds the pipeline. feed returns the inputs, and whatever the caller wants back with the batch's output;
    it raises StopIteration at the end.
    """

    def __init__(self, make: Callable[[Callable[[], tuple[Any, ...]]], Any], feed: Callable[[], tuple[Any, Any]]):
        self._inside: deque[tuple[tuple[Any, ...], Any]] = deque()
        self._again: deque[tuple[tuple[Any, ...], Any]] = deque()
        self._make, self._feed = make, feed
        self._pipeline = make(self._next_inputs)

    def _next_inputs(self) -> tuple[Any, ...]:
        # The graph does not copy its inputs: they have to live until it is done.
        self._inside.append(self._again.popleft() if self._again else self._feed())
        return self._inside[-1][0]

    def run(self) -> tuple[Any, Any]:
        """The next batch: the graph's outputs, and what `feed` returned with its inputs."""
        outputs = self._pipeline.run()
        return outputs, self._inside.popleft()[1]

    @property
    def failing(self) -> tuple[Any, Any]:
        """Inputs of the batch that `run` could not make, and what `feed` returned with them."""
        return self._inside[0]

    def restart(self, *, refeed: bool) -> list[Any]:
        """Begin anew after an error, for the graph's state is not known then. Returns what `feed` returned with the
        batches that were inside, the oldest first. They are lost, unless they are to be fed again."""
        inside = list(self._inside)
        if refeed:
            inside += self._again
        self.close()
        self._again.extend(inside if refeed else ())
        self._pipeline = self._make(self._next_inputs)
        return [given for _, given in inside]

    def close(self) -> None:
        """Wait for the batches inside, and free the graph's buffers."""
        if self._pipeline is not None:
            # Not left to the destructor: an error's traceback may keep the pipeline alive, and its threads would go on
            # reading inputs whose memory others use by then.
            self._pipeline._shutdown()
        self._pipeline = None
        self._inside.clear()
        self._again.clear()


class InUse:
    """Keeps a graph's outputs until the GPU has read them.

    torch reads them on its own stream, and the host, which runs ahead, drops them before that has happened; the graph
    would fill their memory with a later batch. On the CPU there is nothing to wait for.
    """

    #: Outputs that may be kept at a time; for more the host waits.
    LIMIT = 2 * QUEUE_DEPTH

    def __init__(self, device: str):
        self._on_gpu = device == "cuda"
        self._delivered: Any = None
        self._kept: deque[tuple[Any, Any]] = deque()

    def deliver(self, batch: Any) -> None:
        """A batch is handed out; its reader queues what it does with it until `keep_delivered` is called."""
        self._delivered = batch if self._on_gpu else None

    def keep_delivered(self) -> None:
        """The delivered batch's reader has queued all that it does with it."""
        if self._delivered is not None:
            self.keep(self._delivered)
            self._delivered = None

    def keep(self, outputs: Any) -> None:
        """Keep outputs until what has been queued so far, which may read them, is done."""
        if not self._on_gpu:
            return
        done = torch.cuda.Event()
        done.record()
        self._kept.append((done, outputs))
        while self._kept and (len(self._kept) > self.LIMIT or self._kept[0][0].query()):
            self._kept.popleft()[0].synchronize()

    def close(self) -> None:
        """Wait until everything kept has been read."""
        self.keep_delivered()
        while self._kept:
            self._kept.popleft()[0].synchronize()


def to_device(values: npt.NDArray[Any], device: str | torch.device) -> torch.Tensor:
    """An array as a tensor on the device; a GPU takes it in its turn, and the host does not wait for that."""
    tensor = torch.from_numpy(values)
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def give_back_freed() -> None:
    """Return to the system what was freed.

    glibc keeps what a thread freed in an arena of it: loaders made one after the other, each with threads of its own,
    would come to hold several times the memory of one.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
