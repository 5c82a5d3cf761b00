"""The loader: threads that read and check encoded bytes ahead, the DALI graphs, and batches of torch tensors.

draw_batch(seed, step) ─ Source.read, in threads ─ DALI graph, in its threads ─────────────────── Batch
with windows                                     ─ decode graph ─ WindowPool ─ stack graph ────── Batch
"""

import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from types import TracebackType
from typing import Any, Self

import torch

from flow.shard import ShardError
from loaders import pipeline as graphs
from loaders.batch import Batch, StreamSpec
from loaders.draw import VIEWS, Draw, Ints, enumerate_views, num_view_batches, population, rank_draws
from loaders.index import Index
from loaders.pipeline import Graph
from loaders.probe import choose_graph
from loaders.reader import Reader, Request, requests
from loaders.source import Source
from loaders.windows import WindowPool, cut_stacks, to_inputs


class _Graph:
    """A DALI graph fed by a function, and what it was fed for each batch that is still inside.

    feed returns the inputs, and whatever the caller wants back with the batch's output.
    """

    def __init__(self, make: Callable[..., Any], feed: Callable[[], tuple[tuple[Any, ...], Any]], *arguments: Any):
        self._inside: deque[tuple[tuple[Any, ...], Any]] = deque()
        self._feed = feed
        self._pipeline: Any = make(*arguments, self._next_inputs)

    def _next_inputs(self) -> tuple[Any, ...]:
        self._inside.append(self._feed())  # the graph does not copy its inputs: they have to live until it is done
        return self._inside[-1][0]

    def run(self) -> tuple[Any, Any]:
        """The next batch: the graph's outputs, and what `feed` returned with its inputs."""
        outputs = self._pipeline.run()
        return outputs, self._inside.popleft()[1]

    @property
    def failing(self) -> Any:
        """What `feed` returned for the batch that `run` could not make."""
        return self._inside[0][1] if self._inside else None

    def close(self) -> None:
        self._pipeline = None
        self._inside.clear()


class _InUse:
    """Keeps a graph's outputs until the GPU has read them.

    torch reads them on its own stream, and the host, which runs ahead, drops them before that has happened; the graph
    would fill their memory with a later batch. On the CPU there is nothing to wait for.
    """

    #: Outputs that may be kept at a time; for more the host waits.
    LIMIT = 4

    def __init__(self, device: str):
        self._on_gpu = device == "cuda"
        self._delivered: Any = None
        self._kept: deque[tuple[Any, Any]] = deque()

    def deliver(self, batch: Batch) -> Batch:
        """Hand out a batch, to be kept from the next call of `keep_delivered` on."""
        self._delivered = batch if self._on_gpu else None
        return batch

    def keep_delivered(self) -> None:
        """To be called when the batch's reader has queued all that it does with it."""
        self.keep(self._delivered)
        self._delivered = None

    def keep(self, outputs: Any) -> None:
        """Keep outputs until what has been queued so far, which may read them, is done."""
        if not self._on_gpu or outputs is None:
            return
        done = torch.cuda.Event()
        done.record()
        self._kept.append((done, outputs))
        while self._kept and (len(self._kept) > self.LIMIT or self._kept[0][0].query()):
            self._kept.popleft()[0].synchronize()


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
        start_step: int = 0,
        num_batches: int | None = None,
        num_left_out: int = 0,
    ):
        self._source = source
        self._spec = source.spec
        self._graph = graph
        self._num_batches = num_batches
        self.num_left_out = num_left_out
        self._reader = Reader(source, requests(draws, self._spec, start_step, views=num_batches is not None))
        self._batches: deque[Batch] = deque()
        self._in_use = _InUse(graph.device)
        self._pool = WindowPool(self._spec)
        self._codes: list[torch.Tensor] = []  # buffers of crops that are free
        if num_batches is not None:
            self._inputs = graphs.view_inputs
            self._decoder = _Graph(graphs.view_pipeline, self._feed, self._spec, graph, batch_size)
            self._make = self._make_directly
        elif self._spec.stacks_per_window == 1:
            self._inputs = graphs.train_inputs
            self._decoder = _Graph(graphs.train_pipeline, self._feed, self._spec, graph, batch_size)
            self._make = self._make_directly
        else:
            max_images = batch_size * self._spec.window_steps * len(self._spec.kinds)
            self._decoder = _Graph(graphs.decode_pipeline, self._feed_windows, self._spec, graph, max_images)
            self._make = self._make_from_windows
            if graph.device == "cpu":
                self._stacker = _Graph(graphs.stack_pipeline, self._feed_stacks, self._spec, graph, batch_size)
                self._make = self._make_by_stacker

    def __len__(self) -> int:
        """Batches of a test loader, ten for each batch of (video, tau) pairs."""
        if self._num_batches is None:
            raise TypeError("A training loader is endless; take as many steps as you train.")
        return self._num_batches

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch. Raises ShardError if a member is damaged; the loader is of no further use then."""
        self._in_use.keep_delivered()
        while not self._batches:
            self._batches.extend(self._make())
        return self._in_use.deliver(self._batches.popleft())

    def _make_directly(self) -> list[Batch]:
        """A training batch, or the ten views of a test batch."""
        outputs, request = self._decode()
        return [self._batch(request.draw, _as_torch(output)) for output in outputs]

    def _make_by_stacker(self) -> list[Batch]:
        (output,), (draw, codes) = self._stacker.run()
        self._codes.append(codes)
        return [self._batch(draw, _as_torch(output))]

    def _make_from_windows(self) -> list[Batch]:
        outputs, request = self._decode()
        codes = self._cut(outputs, request)
        images = to_inputs(codes, request.draw, self._entries(request.draw), self._spec)
        self._codes.append(codes)  # the device will write to it after it has read it
        return [self._batch(request.draw, images)]

    def _decode(self) -> tuple[Any, Request]:
        """Outputs of the first graph, and the request they answer."""
        try:
            outputs, (request, encoded) = self._decoder.run()
        except RuntimeError as error:
            raise self._explained(error) from error
        self._source.release(encoded)
        return outputs, request

    def _feed(self) -> tuple[tuple[Any, ...], Any]:
        request, encoded = self._reader.take()
        entries = self._source.entries(request.video, request.first, request.steps)
        return self._inputs(encoded, request.draw, entries, self._spec, self._graph), (request, encoded)

    def _feed_windows(self) -> tuple[tuple[Any, ...], Any]:
        request, encoded = self._reader.take()
        return graphs.decode_inputs(encoded, self._graph), (request, encoded)

    def _feed_stacks(self) -> tuple[tuple[Any, ...], Any]:
        outputs, request = self._decode()
        codes, draw = self._cut(outputs, request), request.draw
        return graphs.stack_inputs(codes.flatten(0, 1).numpy(), draw, self._entries(draw), self._spec), (draw, codes)

    def _cut(self, outputs: Any, request: Request) -> torch.Tensor:
        """The crops (n, 2L, crop, crop, 1) uint8 of the request's samples, by way of the pool."""
        assert request.new is not None
        self._pool.add(request.new, outputs[0])
        self._in_use.keep(outputs)
        shape = len(request.draw), self._spec.num_images, self._spec.crop_px, self._spec.crop_px, 1
        codes = self._codes.pop() if self._codes else torch.empty(shape, dtype=torch.uint8, device=self._graph.device)
        cut_stacks(self._pool.stacks(request.draw), request.draw, codes)
        self._pool.drop_used(request.new.step)
        return codes

    def _entries(self, draw: Draw) -> Any:
        return self._source.entries(draw.video, draw.tau, self._spec.steps)

    def _batch(self, draw: Draw, images: torch.Tensor) -> Batch:
        labels = torch.from_numpy(self._source.index.labels[draw.video])
        return Batch(
            inputs=images.view(len(draw), self._spec.num_channels, self._spec.crop_px, self._spec.crop_px),
            labels=labels.to(self._graph.device, non_blocking=True),
            draw=draw,
        )

    def _explained(self, error: RuntimeError) -> Exception:
        """A decoder's complaint about image i of a flat batch, as the member that it is."""
        found = re.search(r"Failed to decode sample #(\d+)", str(error))
        if not found or not self._decoder.failing:
            return error
        request, _ = self._decoder.failing
        step, kind = divmod(int(found.group(1)), len(self._spec.kinds))
        run, step = divmod(step, request.steps)
        where = self._source.where(int(request.video[run]), int(request.first[run]) + step, kind)
        return ShardError(f"{where}: no decodable JPEG, though its bytes are what was packed. Pack the set again.")

    def close(self) -> None:
        """Stop the reader and free the graphs' buffers. Batches already delivered stay valid."""
        self._reader.close()
        self._decoder.close()
        if self._make == self._make_by_stacker:
            self._stacker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _choose_graph(
    source: Source, draws: Iterator[Draw], device: str, num_threads: int, decoder: str
) -> tuple[Graph, Iterator[Draw]]:
    """The graph to take, measured on the first batch; and the draws, that one too."""
    first = next(draws)
    graph = choose_graph(device, num_threads, decoder, lambda graph: _measure(source, first, graph))
    return graph, chain([first], draws)


def _measure(source: Source, draw: Draw, graph: Graph, num_batches: int = 6) -> float:
    """Samples/s of the training graph that makes a batch again and again; reading is not counted."""
    spec = source.spec
    run = draw.video, draw.tau, spec.steps
    encoded, entries = source.read(*run), source.entries(*run)
    inputs = graphs.train_inputs(encoded, draw, entries, spec, graph)
    pipeline = graphs.train_pipeline(spec, graph, len(draw), lambda: inputs)
    for _ in range(graphs.QUEUE_DEPTH + 1):
        pipeline.run()
    start_s = time.perf_counter()
    for _ in range(num_batches):
        pipeline.run()
    return num_batches * len(draw) / (time.perf_counter() - start_s)


def _as_torch(output: Any) -> torch.Tensor:
    """A graph's output in one piece, not copied: the executor frees a buffer only when nobody holds it."""
    return torch.from_dlpack(output.as_tensor())


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
    decoder: str = "auto",
    graph: Graph | None = None,
) -> DaliLoader:
    """Endless training batches; item s is this rank's slice of global batch start_step + s.

    rows: the training list, rows of the index. batch_size: of the *global* batch; each rank gets its share of it,
    batch_size // world_size samples. decoder: as in `probe.choose_graph`. graph: overrides device,
    num_threads and decoder.
    Raises ValueError if the ranks cannot share the batch, or no video fits.
    """
    videos = population(index, rows, spec)
    draws = rank_draws(
        videos, spec, seed=seed, batch_size=batch_size, rank=rank, world_size=world_size, start_step=start_step
    )
    source = Source(index, spec)
    if graph is None:
        graph, draws = _choose_graph(source, draws, device, num_threads, decoder)
    return DaliLoader(
        source,
        draws,
        graph,
        batch_size // world_size,
        start_step=start_step,
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
    decoder: str = "auto",
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
    source = Source(index, spec)
    if graph is None:
        graph, draws = _choose_graph(source, draws, device, num_threads, decoder)
    return DaliLoader(source, draws, graph, batch_size, num_batches=pairs * len(VIEWS))
