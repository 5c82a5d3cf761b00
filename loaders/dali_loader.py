"""The loader: threads that read and check encoded bytes ahead, the DALI graphs, and batches of torch tensors.

draw_batch(seed, step) ─ Source.read, in threads ─ DALI graph, in its threads ─────────────────── Batch
with windows                                     ─ decode graph ─ WindowPool ─ stack graph ────── Batch
trajectories                                     ─ field graph ─ torch, on the device ─────────── Batch
"""

import logging
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from loaders import pipeline as graphs
from loaders.ahead import ahead
from loaders.batch import Batch, StreamSpec
from loaders.damage import Replacements, read_request
from loaders.draw import Draw, Ints, check_batch_size, population, rank_slots, slot_draws
from loaders.graph import FedGraph, InUse, give_back_freed, to_device
from loaders.index import Index
from loaders.inputs import request_inputs, stack_inputs
from loaders.pipeline import Graph
from loaders.probe import choose_graph, samples_per_s
from loaders.reader import Reader
from loaders.region import Patch, crops, largest_patch, reachable, stored_patch, whole_frames
from loaders.request import Request, requests
from loaders.rescale import settled, stored_sizes
from loaders.shard_pool import pooled
from loaders.source import SampleError, Source
from loaders.trajectory import cut_view, stack_crops, stack_frames
from loaders.views import VIEWS, enumerate_views, num_view_batches
from loaders.windows import WindowPool, cut_stacks, to_inputs

logger = logging.getLogger(__name__)


class DaliLoader:
    """Iterates over Batch objects; see `train_loader` and `view_loader`. Close it, or use it as a context manager.

    rows: the videos that draws are of; by default all. num_left_out: training videos that are too short for a sample.
    """

    def __init__(
        self,
        source: Source,
        draws: Iterator[Draw],
        graph: Graph,
        batch_size: int,
        *,
        rows: Ints | None = None,
        start_step: int = 0,
        num_batches: int | None = None,
        num_left_out: int = 0,
        timeout_s: float = 300.0,
        replacements: Replacements | None = None,
    ):
        self._source, self._spec, self._graph = source, source.spec, graph
        self._num_batches = num_batches
        self.num_left_out = num_left_out
        views = num_batches is not None
        asked = ahead(requests(draws, self._spec, start_step, views), source.index, source.ask)
        self._reader = Reader(source, asked, timeout_s=timeout_s, replacements=replacements)
        self._replacements = replacements
        self._batches: Iterator[Batch] = iter(())
        self._in_use = InUse(graph.device)
        self._views = views
        self._decoder = FedGraph(partial(_decoding(source, views), self._spec, graph, batch_size), self._feed)
        self._graphs = [self._decoder]
        self._make: Callable[[], Iterator[Batch]] = self._make_directly
        if self._spec.follows_trajectories:
            self._make = self._make_views_of_trajectories if views else self._make_trajectories
        elif self._spec.stacks_per_window > 1 and not views:
            rows = np.arange(source.index.num_videos) if rows is None else rows
            self._pool = WindowPool(self._spec, int(stored_sizes(source.index, rows).prod(axis=1).max()))
            self._patch_px = largest_patch(self._spec, source.index, rows)
            self._codes: list[torch.Tensor] = []  # buffers of crops that are free
            self._make = self._make_from_windows
            if graph.device == "cpu":
                self._stacker = FedGraph(
                    partial(graphs.stack_pipeline, self._spec, graph, batch_size), self._feed_stacks
                )
                self._graphs.append(self._stacker)
                self._make = self._make_by_stacker

    @property
    def num_replaced(self) -> int:
        """Damaged samples, or windows, that were replaced so far, also in batches that are only read ahead yet."""
        return self._replacements.num_replaced if self._replacements else 0

    def __len__(self) -> int:
        """Batches of a test loader, ten for each batch of (video, tau) pairs."""
        if self._num_batches is None:
            raise TypeError("A training loader is endless; take as many steps as you train.")
        return self._num_batches

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises SampleError if a member is damaged, and ShardError if more were than may be replaced; TimeoutError if its
        bytes do not come. The loader keeps its place: asked again, it tries to make the same batch.
        """
        self._in_use.keep_delivered()
        while (batch := next(self._batches, None)) is None:
            self._batches = self._make()
        self._in_use.deliver(batch)
        return batch

    def _make_directly(self) -> Iterator[Batch]:
        """A training batch, or the ten views of a test batch."""
        outputs, request = self._decode()
        return iter([self._batch(request.draw, _as_torch(output)) for output in outputs])

    def _make_by_stacker(self) -> Iterator[Batch]:
        try:
            (output,), (draw, codes) = self._stacker.run()
        except Exception:
            self._stacker.restart(refeed=True)
            raise
        self._codes.append(codes)
        return iter([self._batch(draw, _as_torch(output))])

    def _make_from_windows(self) -> Iterator[Batch]:
        outputs, request = self._decode()
        codes, patch = self._cut(outputs, request)
        images = to_inputs(codes, request.draw, self._entries(request.draw), self._spec, patch)
        self._codes.append(codes)  # the device will write to it after it has read it
        return iter([self._batch(request.draw, images)])

    def _make_trajectories(self) -> Iterator[Batch]:
        outputs, request = self._decode()
        entries, draw = self._entries(request.draw), request.draw
        region = reachable(draw, entries, self._spec, self._source.index)
        images = stack_crops(self._fields(outputs), draw, entries, region, self._spec)
        self._in_use.keep(outputs)
        return iter([self._batch(draw, images)])

    def _make_views_of_trajectories(self) -> Iterator[Batch]:
        """The ten views one by one: all at once would hold ten times their memory."""
        outputs, request = self._decode()
        region = whole_frames(request.draw, self._spec, self._source.index)
        images = stack_frames(self._fields(outputs), self._entries(request.draw), region, self._spec)
        self._in_use.keep(outputs)
        return (self._batch(request.draw, cut_view(images, view, region, self._spec)) for view in VIEWS)

    def _fields(self, outputs: Any) -> torch.Tensor:
        """A field graph's output, (n, 2L, H, W) px/frame."""
        images = _as_torch(outputs[0])
        return images.view(-1, self._spec.num_channels, *images.shape[1:3])

    def _decode(self) -> tuple[Any, Request]:
        """Outputs of the first graph, and the request they answer. After an error the same request is next again."""
        while True:
            try:
                outputs, (request, encoded) = self._decoder.run()
            except StopIteration:
                raise
            except Exception as error:
                undecodable = self._undecodable(error)
                try:  # what takes its place is known before threads begin to read these batches again
                    if undecodable is not None and self._replacements is not None:
                        self._replacements.draw_others(self._decoder.failing[1][0], undecodable)
                finally:
                    self._restart_decoder()
                if undecodable is None:
                    raise
                if self._replacements is None:
                    raise undecodable from error
            else:
                self._source.release(encoded)
                return outputs, request

    def _restart_decoder(self) -> None:
        """Build the decoding graph anew. The batches inside will be made again."""
        self._in_use.close()
        inside = self._decoder.restart(refeed=False)
        for _, encoded in inside:
            self._source.release(encoded)
        self._reader.put_back([request for request, _ in inside])

    def _feed(self) -> tuple[tuple[Any, ...], Any]:
        request, encoded = self._reader.take()
        return request_inputs(request, encoded, self._source, self._graph, self._views), (request, encoded)

    def _feed_stacks(self) -> tuple[tuple[Any, ...], Any]:
        outputs, request = self._decode()
        (codes, patch), draw = self._cut(outputs, request), request.draw
        inputs = stack_inputs(codes.flatten(0, 1).numpy(), draw, self._entries(draw), self._spec, patch)
        return inputs, (draw, codes)

    def _cut(self, outputs: Any, request: Request) -> tuple[torch.Tensor, Patch]:
        """The crops (n, 2L, crop, crop, 1) uint8 of the request's samples, by way of the pool; if frames are rescaled,
        the patches that crops are made from, in the upper left of what is enough for any. And where the patches lie."""
        assert request.new is not None
        self._pool.add(request.new, outputs[0])
        self._in_use.keep(outputs)
        index, draw = self._source.index, request.draw
        patch = stored_patch(crops(draw, self._spec, index), draw.video, index)
        codes = self._codes.pop() if self._codes else self._empty_codes(len(draw))
        cut_stacks(self._pool.stacks(draw), patch, codes)
        self._pool.drop_used(request.new.step)
        return codes, patch

    def _empty_codes(self, n: int) -> torch.Tensor:
        side = self._patch_px
        return torch.empty(n, self._spec.num_images, side, side, 1, dtype=torch.uint8, device=self._graph.device)

    def _entries(self, draw: Draw) -> Any:
        return self._source.entries(draw.video, draw.tau, self._spec.steps)

    def _batch(self, draw: Draw, images: torch.Tensor) -> Batch:
        return Batch(
            inputs=images.view(len(draw), self._spec.num_channels, self._spec.crop_px, self._spec.crop_px),
            labels=to_device(self._source.index.labels[draw.video], self._graph.device),
            draw=draw,
        )

    def _undecodable(self, error: Exception) -> SampleError | None:
        """A decoder's complaint about image i of a flat batch, as the member that it is; None for any other error."""
        found = re.search(r"Failed to decode sample #(\d+)", str(error)) if isinstance(error, RuntimeError) else None
        if not found:
            return None
        inputs, (request, _) = self._decoder.failing
        numbers = [np.arange(len(inputs[0]))]
        if self._graph.decoder == "shared":  # each decoder counts its own images, and which one complains is not said
            numbers = [np.flatnonzero(inputs[1]), np.flatnonzero(~inputs[1])]
        images = [int(its[int(found.group(1))]) for its in numbers if int(found.group(1)) < len(its)]
        runs = tuple(image // (request.steps * len(self._spec.kinds)) for image in images)
        places = [self._where(request, image) for image in images]
        return SampleError(
            f"{' or '.join(places)}: no decodable JPEG, though its bytes are what was packed. Pack the set again.", runs
        )

    def _where(self, request: Request, image: int) -> str:
        """Shard, member and offset of an image of a request."""
        step, kind = divmod(image, len(self._spec.kinds))
        run, step = divmod(step, request.steps)
        return self._source.where(int(request.video[run]), int(request.tau[run]), step, kind)

    def close(self) -> None:
        """Stop the reader and free the graphs' buffers. Batches already delivered stay valid on the CPU."""
        self._reader.close()
        self._in_use.close()
        for graph in self._graphs:
            graph.close()
        give_back_freed()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _decoding(source: Source, views: bool) -> Callable[..., Any]:
    """How a loader's decoding graph is made."""
    if source.spec.stacks_per_window > 1 and not views:
        return graphs.decode_pipeline
    if source.spec.follows_trajectories:
        return graphs.field_pipeline
    return graphs.view_pipeline if views else graphs.train_pipeline


def _choose_graph(
    source: Source,
    draws: Iterator[Draw],
    views: bool,
    device: str,
    num_threads: int,
    decoder: str,
    replacements: Replacements | None = None,
) -> tuple[Graph, Iterator[Draw]]:
    """The graph to take, measured on the first batch; and the draws, that one too."""
    first = next(draws)
    make = _decoding(source, views)

    def measure(graph: Graph) -> float:
        (request,) = requests(iter([first]), source.spec, 0, views)
        request, encoded = read_request(source, request, replacements)
        fed = request_inputs(request, encoded, source, graph, views)
        try:
            return samples_per_s(make(source.spec, graph, len(first), lambda: fed), len(first))
        except RuntimeError as error:  # an image that it cannot decode, which the loader names when it comes to it
            logger.warning("%s fails on the first batch: %s", graph, error)
            return 1e-9

    whole_frames = views or source.spec.stacks_per_window > 1
    return choose_graph(device, num_threads, decoder, measure, whole_frames=whole_frames), chain([first], draws)


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
    slots: tuple[int, int] | None = None,
    start_step: int = 0,
    device: str = "cpu",
    num_threads: int = 2,
    decoder: str = "auto",
    graph: Graph | None = None,
    timeout_s: float = 300.0,
    on_damage: str = "raise",
    max_damaged_pct: float = 1.0,
    pool_shards: int = 0,
    pool_steps: int = 4,
) -> DaliLoader:
    """Endless training batches; item s is this rank's slice of global batch start_step + s.

    rows: the training list, rows of the index. batch_size: of the *global* batch; each rank gets its share of it,
    batch_size // world_size samples, or those that `slots` says, (begin, end). decoder: as in `probe.choose_graph`.
    graph: overrides device, num_threads and decoder. timeout_s: longest wait for a batch's bytes.
    on_damage: "raise"; or "skip", which replaces a damaged sample by another draw of its class, logs and counts it, and
    raises when more than max_damaged_pct of the samples, counted from a thousand on, were replaced.
    pool_shards, pool_steps: samples are drawn from a moving part of the shards, see `shard_pool`; 0: from all.
    Raises ValueError if the ranks cannot share the batch, no video fits, or the pool is too small for the classes.
    """
    spec = settled(spec, index, rows)
    videos = pooled(population(index, rows, spec), index, pool_shards, pool_steps)
    check_batch_size(batch_size, world_size, spec)
    slots = slots or rank_slots(rank, world_size, batch_size)
    draws = slot_draws(videos, spec, seed=seed, batch_size=batch_size, slots=slots, start_step=start_step)
    source = Source(index, spec)
    replacements = None
    if on_damage == "skip":
        replacements = Replacements(videos, spec, seed=seed, first_slot=slots[0], max_damaged_pct=max_damaged_pct)
    if graph is None:
        graph, draws = _choose_graph(source, draws, False, device, num_threads, decoder, replacements)
    return DaliLoader(
        source,
        draws,
        graph,
        slots[1] - slots[0],
        rows=rows,
        start_step=start_step,
        num_left_out=videos.num_left_out,
        timeout_s=timeout_s,
        replacements=replacements,
    )


def view_loader(
    index: Index,
    rows: Ints,
    spec: StreamSpec,
    *,
    num_taus: int = 25,
    taus: Ints | None = None,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: str = "cpu",
    num_threads: int = 2,
    decoder: str = "auto",
    graph: Graph | None = None,
    timeout_s: float = 300.0,
) -> DaliLoader:
    """All test views of the listed videos, once: num_taus starts x 10 crops (sec. 5), to each rank a stretch.

    taus (len(rows),): one start for each row instead; rows may then name a video several times.

    Batches come in tens: the views of VIEWS of the same batch_size (video, tau) pairs, which are decoded once. All
    ranks get the same number of batches; padding has valid = False. batch_size is that of one rank. Damage is always an
    error here: scores of other videos would be no test.
    """
    spec = settled(spec, index, rows)
    pairs = num_view_batches(len(rows) * (num_taus if taus is None else 1), batch_size, world_size)
    draws = enumerate_views(
        index,
        rows,
        spec,
        num_taus=num_taus,
        taus=taus,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
    )
    source = Source(index, spec)
    if graph is None:
        graph, draws = _choose_graph(source, draws, True, device, num_threads, decoder)
    return DaliLoader(source, draws, graph, batch_size, num_batches=pairs * len(VIEWS), timeout_s=timeout_s)
