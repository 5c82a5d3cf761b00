"""The contract of `dali_loader` again, in plain OpenCV and numpy: the oracle in tests, a row in benchmarks."""

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from flow.codec import decode_component, decode_rgb
from flow.fields import mirror_field, rescale_field, rescale_image, stack_trajectories, subtract_mean
from loaders.ahead import ahead
from loaders.batch import FLOW_SCALE, PCA_STD, PCA_VECTORS, RGB_MEAN, RGB_STD, Batch, StreamSpec
from loaders.damage import Replacements, read_request
from loaders.draw import Draw, Ints, check_batch_size, population, rank_slots, slot_draws
from loaders.index import Index
from loaders.request import Request, requests
from loaders.rescale import frame_sizes
from loaders.shard_pool import pooled
from loaders.source import Encoded, SampleError, Source
from loaders.views import VIEWS, enumerate_views, num_view_batches, view_crop

Array = npt.NDArray[np.float32]


class ReferenceLoader:
    """Iterates over Batch objects; see `dali_loader.DaliLoader`, which it equals but for speed."""

    def __init__(
        self,
        source: Source,
        draws: Iterator[Draw],
        *,
        device: str,
        num_batches: int | None = None,
        num_left_out: int = 0,
        replacements: Replacements | None = None,
    ):
        self._source, self._spec = source, source.spec
        self._device = device
        self._num_batches = num_batches
        self.num_left_out = num_left_out
        self._replacements = replacements
        alone = requests(draws, self._spec, 0, views=True)  # each sample is read alone, also of a window
        self._requests = ahead(alone, source.index, source.ask)
        self._request: Request | None = None
        self._batches: Iterator[Batch] = iter(())

    @property
    def num_replaced(self) -> int:
        return self._replacements.num_replaced if self._replacements else 0

    def __len__(self) -> int:
        if self._num_batches is None:
            raise TypeError("A training loader is endless; take as many steps as you train.")
        return self._num_batches

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        while (batch := next(self._batches, None)) is None:
            self._request = self._request or next(self._requests)  # after an error the same one again
            draw, samples = self._read(self._request)
            self._request = None
            self._batches = (
                iter([self._train(draw, samples)]) if self._num_batches is None else self._test(draw, samples)
            )
        return batch

    def _read(self, request: Request) -> tuple[Draw, list[Array]]:
        """A request's samples, damaged ones replaced if they may be."""
        while True:
            request, encoded = read_request(self._source, request, self._replacements)
            if self._replacements:
                self._replacements.taken(request)
            try:
                return request.draw, self._samples(request.draw, encoded)
            except SampleError as error:
                if self._replacements is None:
                    raise
                self._replacements.draw_others(request, error)

    def _train(self, draw: Draw, samples: list[Array]) -> Batch:
        side, inputs = self._spec.crop_px, []
        for i, sample in enumerate(samples):
            y0, x0 = draw.crop[i]
            inputs.append(self._input(sample[..., y0 : y0 + side, x0 : x0 + side], draw.mirror[i], draw.alpha[i]))
        return self._batch(draw, inputs)

    def _test(self, draw: Draw, samples: list[Array]) -> Iterator[Batch]:
        side = self._spec.crop_px
        for view in VIEWS:
            crops = []
            for sample in samples:
                y0, x0 = view_crop(view, (sample.shape[-2], sample.shape[-1]), side)
                crop = sample[..., y0 : y0 + side, x0 : x0 + side]
                crops.append(self._input(crop, view[2], np.zeros(3, np.float32)))
            yield self._batch(draw, crops)

    def _samples(self, draw: Draw, encoded: Encoded) -> list[Array]:
        """Each sample's whole frames: (n, 3, H, W) in grey levels, or fields (L, 2, H, W) in px/frame.

        Raises SampleError for a JPEG that cannot be decoded.
        """
        spec = self._spec
        images = [image.tobytes() for image in encoded.images()]
        own = [images[at : at + spec.num_images] for at in range(0, len(images), spec.num_images)]
        sizes = frame_sizes(self._source.index, draw.video, spec).tolist()
        entries = self._source.stored_entries(draw.video, draw.tau, spec.steps)  # (n, steps, kinds)
        samples: list[Array] = []
        for jpegs, row, size in zip(own, entries, sizes, strict=True):
            try:
                if spec.is_temporal:
                    samples.append(self._fields(jpegs, row, size))
                else:
                    samples.append(np.stack([_frame(jpeg, size) for jpeg in jpegs]))
            except ValueError as error:
                i = len(samples)
                place = self._source.where(int(draw.video[i]), int(draw.tau[i]), 0, 0)
                raise SampleError(f"{place}, or soon after it: no decodable JPEG ({error}).", (i,)) from error
        return samples

    def _fields(self, jpegs: list[bytes], entries: Any, size: list[int]) -> Array:
        """The fields (L, 2, H, W) of one sample, (H, W) = size; entries (L, 2)."""
        spec = self._spec
        ranges = entries[["lo", "hi"]].reshape(-1).tolist()
        raw = np.stack([decode_component(jpeg, lo, hi) for jpeg, (lo, hi) in zip(jpegs, ranges, strict=True)])
        means, stored = entries["mean"], raw.shape[1:]
        fields = raw.reshape(spec.L, 2, *stored)
        if list(stored) != size:
            fields = np.stack([rescale_field(field, *size) for field in fields])
            means = means * np.array([size[1] / stored[1], size[0] / stored[0]], np.float32)
        fields = fields.reshape(spec.num_chains, spec.chain_steps, 2, *size)
        if spec.follows_trajectories:
            fields = np.stack([stack_trajectories(chain, 0, spec.chain_steps) for chain in fields])
        fields = fields.reshape(spec.L, 2, *size)
        if spec.subtract_mean:
            fields = np.stack([subtract_mean(field, mean) for field, mean in zip(fields, means, strict=True)])
        return fields

    def _input(self, crop: Array, mirror: bool, alpha: Array) -> Array:
        """The net's input (C, crop, crop) from a crop of a sample."""
        if not self._spec.is_temporal:
            offset = PCA_VECTORS @ (alpha * PCA_STD)
            rgb = np.concatenate((crop + (offset - RGB_MEAN)[:, None, None]) / RGB_STD[:, None, None])
            return (rgb[:, :, ::-1] if mirror else rgb).astype(np.float32)
        fields = [mirror_field(field) if mirror else field for field in crop]
        return np.concatenate(fields) * np.float32(FLOW_SCALE)

    def _batch(self, draw: Draw, samples: list[Array]) -> Batch:
        return Batch(
            inputs=torch.from_numpy(np.stack(samples)).to(self._device),
            labels=torch.from_numpy(self._source.index.labels[draw.video]).to(self._device),
            draw=draw,
        )

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _frame(jpeg: bytes, size: list[int]) -> Array:
    """An RGB frame (3, H, W) in grey levels, (H, W) = size."""
    frame = decode_rgb(jpeg).transpose(2, 0, 1).astype(np.float32)
    return frame if list(frame.shape[1:]) == size else rescale_image(frame, *size)


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
    on_damage: str = "raise",
    max_damaged_pct: float = 1.0,
    pool_shards: int = 0,
    pool_steps: int = 4,
    **_: Any,
) -> ReferenceLoader:
    """As `dali_loader.train_loader`, computed on the CPU; its num_threads, decoder, graph and timeout_s are ignored.

    Raises ValueError if damaged samples of windows are to be skipped: this loader does not read whole windows, and
    would not replace the same ones.
    """
    if on_damage == "skip" and spec.stacks_per_window > 1:
        raise ValueError(
            "data.loader=reference with data.stacks_per_window > 1 cannot skip damage. Take data.loader=dali, or "
            "data.on_damage=raise."
        )
    videos = pooled(population(index, rows, spec), index, pool_shards, pool_steps)
    check_batch_size(batch_size, world_size, spec)
    slots = slots or rank_slots(rank, world_size, batch_size)
    draws = slot_draws(videos, spec, seed=seed, batch_size=batch_size, slots=slots, start_step=start_step)
    replacements = None
    if on_damage == "skip":
        replacements = Replacements(videos, spec, seed=seed, first_slot=slots[0], max_damaged_pct=max_damaged_pct)
    return ReferenceLoader(
        Source(index, spec), draws, device=device, num_left_out=videos.num_left_out, replacements=replacements
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
    **_: Any,
) -> ReferenceLoader:
    """As `dali_loader.view_loader`, computed on the CPU; its num_threads, decoder, graph and timeout_s are ignored."""
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
    return ReferenceLoader(Source(index, spec), draws, device=device, num_batches=pairs * len(VIEWS))
