"""The loader: a thread that reads and checks encoded bytes ahead, the DALI graph, and batches of torch tensors.

draw_batch(seed, step) ─ Source.read, in a thread ─ DALI graph, in its threads ─ Batch
"""

import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch

from flow.shard import ShardError
from loaders.batch import Batch, StreamSpec
from loaders.draw import VIEWS, Draw, Ints, enumerate_views, num_view_batches, population, rank_draws
from loaders.index import Index
from loaders.pipeline import Graph, train_inputs, train_pipeline, view_inputs, view_pipeline
from loaders.probe import default_graph
from loaders.source import Encoded, Source

#: Batches read and checked ahead of the graph's own queue of two.
_READ_AHEAD = 2


class DaliLoader:
    """Iterates over Batch objects; see `train_loader` and `view_loader`. Close it, or use it as a context manager.

    num_left_out: training videos that are too short for a sample.
    """

    def __init__(
        self,
        source: Source,
        draws: Iterator[Draw],
        graph: Graph,
        batch_size: int,
        *,
        num_batches: int | None = None,
        num_left_out: int = 0,
    ):
        self._source = source
        self._spec = source.spec
        self._draws = draws
        self._device = torch.device(graph.device)
        self._num_batches = num_batches
        self.num_left_out = num_left_out
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="loader-read")
        self._ahead: deque[Future[Encoded]] = deque()
        self._in_graph: deque[Draw] = deque()
        self._batches: deque[Batch] = deque()
        self._test = num_batches is not None
        make: Callable[..., Any] = view_pipeline if self._test else train_pipeline
        self._pipeline = make(self._spec, graph, batch_size, self._feed)

    def __len__(self) -> int:
        """Batches of a test loader, ten for each batch of (video, tau) pairs."""
        if self._num_batches is None:
            raise TypeError("A training loader is endless; take as many steps as you train.")
        return self._num_batches

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch. Raises ShardError if a member is damaged; the loader is of no further use then."""
        while not self._batches:
            try:
                outputs = self._pipeline.run()
            except RuntimeError as error:
                raise self._explained(error) from error
            draw = self._in_graph.popleft()
            self._batches.extend(self._batch(draw, output) for output in outputs)
        return self._batches.popleft()

    def _feed(self) -> tuple[Any, ...]:
        """Inputs of the next batch, for the graph's external source. Raises StopIteration at the end of the draws."""
        while len(self._ahead) <= _READ_AHEAD and (draw := next(self._draws, None)) is not None:
            self._ahead.append(self._reader.submit(self._source.read, draw))
        if not self._ahead:
            raise StopIteration
        encoded = self._ahead.popleft().result()
        self._in_graph.append(encoded.draw)
        return (view_inputs if self._test else train_inputs)(encoded, self._spec)

    def _batch(self, draw: Draw, output: Any) -> Batch:
        # The view stays valid after later runs: the executor frees a buffer only when nobody holds it.
        images = torch.from_dlpack(output.as_tensor())  # (n * num_images, c, crop, crop)
        return Batch(
            inputs=images.view(len(draw), self._spec.num_channels, self._spec.crop_px, self._spec.crop_px),
            labels=torch.from_numpy(self._source.index.labels[draw.video]).to(self._device, non_blocking=True),
            videos=draw.video,
            tau=draw.tau,
            valid=draw.valid,
        )

    def _explained(self, error: RuntimeError) -> Exception:
        """A decoder's complaint about image i of a flat batch, as the member that it is."""
        found = re.search(r"Failed to decode sample #(\d+)", str(error))
        if not found or not self._in_graph:
            return error
        sample, image = divmod(int(found.group(1)), self._spec.num_images)
        where = self._source.where(self._in_graph[0], sample, image)
        return ShardError(f"{where}: no decodable JPEG, though its bytes are what was packed. Pack the set again.")

    def close(self) -> None:
        """Stop the reader and free the graph's buffers. Batches already delivered stay valid."""
        self._draws = iter(())
        for future in self._ahead:
            future.cancel()
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
        self._source.close()
        self._pipeline = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def train_loader(
    index: Index,
    rows: Ints,
    spec: StreamSpec,
    *,
    seed: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    device: str = "cpu",
    num_threads: int = 2,
    graph: Graph | None = None,
) -> DaliLoader:
    """Endless training batches; item s is this rank's slice of global batch start_step + s.

    rows: the training list, rows of the index. batch_size: of the *global* batch; each rank gets its share of it,
    batch_size // world_size samples. graph: overrides device and num_threads.
    Raises ValueError if the ranks cannot share the batch, or no video fits.
    """
    videos = population(index, rows, spec)
    return DaliLoader(
        Source(index, spec),
        rank_draws(
            videos, spec, seed=seed, batch_size=batch_size, rank=rank, world_size=world_size, start_step=start_step
        ),
        graph or default_graph(device, num_threads),
        batch_size // world_size,
        num_left_out=videos.num_left_out,
    )


def view_loader(
    index: Index,
    rows: Ints,
    spec: StreamSpec,
    *,
    num_taus: int = 25,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: str = "cpu",
    num_threads: int = 2,
    graph: Graph | None = None,
) -> DaliLoader:
    """All test views of the listed videos, once: num_taus starts x 10 crops (sec. 5), dealt out to the ranks.

    Batches come in tens: the views of VIEWS of the same batch_size (video, tau) pairs, which are decoded once. All
    ranks get the same number of batches; padding has valid = False. batch_size is that of one rank.
    """
    pairs = num_view_batches(len(rows) * num_taus, batch_size, world_size)
    draws = enumerate_views(
        index, rows, spec, num_taus=num_taus, batch_size=batch_size, rank=rank, world_size=world_size
    )
    return DaliLoader(
        Source(index, spec),
        draws,
        graph or default_graph(device, num_threads),
        batch_size,
        num_batches=pairs * len(VIEWS),
    )
