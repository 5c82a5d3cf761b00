"""What bounds a loader: decoding, reading and writing the same batches, each alone. Ceilings deliver nothing.

All run on the host's cores, except that the batch is written where it is to be.
"""

import os
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import cv2
import numpy as np
import torch
from row import Job

from flow.shard import CLIP_FRAMES
from loaders.draw import Draw, draw_batch, population
from loaders.index import Index, open_index
from loaders.source import Encoded, Source

#: Different batches that the ceilings take by turns: encoded ones in memory, and extents. Few, so that the processor's
#: last cache may hold the encoded ones, which only raises a ceiling.
_NUM_DECODED, _NUM_READ = 3, 32


def ceiling_decode(job: Job) -> Iterator[None]:
    """libjpeg-turbo, through OpenCV, decodes every image of a batch in full and keeps nothing, one worker a core."""
    flag = cv2.IMREAD_COLOR if job.spec.stream == "spatial" else cv2.IMREAD_GRAYSCALE
    cv2.setNumThreads(1)

    def decode(encoded: Encoded) -> None:
        for image in encoded.images():
            cv2.imdecode(image, flag)

    return _in_workers(decode, _encoded(job), job)


def ceiling_region(job: Job) -> Iterator[None]:
    """DALI decodes the crops of a batch, to uint8, and nothing else: no affine map, no reading, no checks."""
    import nvidia.dali.fn as fn
    import nvidia.dali.types as types
    from nvidia.dali import pipeline_def

    rows = [encoded.rows for encoded in _encoded(job)]  # one array a batch, not copied, as the loader feeds them
    starts = [np.repeat(draw.crop, job.spec.num_images, axis=0).astype(np.int32) for draw in _draws(job, _NUM_DECODED)]
    batches = list(zip(rows, starts, strict=True))
    color, side = types.RGB if job.spec.stream == "spatial" else types.GRAY, job.spec.crop_px

    @pipeline_def(batch_size=job.batch_size * job.spec.num_images, num_threads=job.cores, device_id=None)
    def build() -> Any:
        source = (batches[i % len(batches)] for i in count())
        inputs = {"num_outputs": 2, "dtype": [types.UINT8, types.INT32], "ndim": 1, "no_copy": True}
        jpeg, start = fn.external_source(source=source, **inputs)
        return fn.decoders.image_slice(jpeg, start=start, shape=[side, side], axes=[0, 1], output_type=color)

    pipeline = build()
    pipeline.build()
    while True:
        pipeline.run()
        yield


def ceiling_read(job: Job) -> Iterator[None]:
    """The bytes of a batch are read from the shards, one read a stack, one worker a core; no CRC, no decoding."""
    index = open_index(job.root)
    shards = [os.open(index.root / shard, os.O_RDONLY) for shard in index.shards]
    batches = [extents(index, draw, job) for draw in _draws(job, _NUM_READ)]
    buffer = bytearray(max(size for batch in batches for _, _, size in batch))

    def read(batch: list[tuple[int, int, int]]) -> None:
        for shard, begin, size in batch:
            os.preadv(shards[shard], [memoryview(buffer)[:size]], begin)

    return _in_workers(read, batches, job)


def ceiling_write(job: Job) -> Iterator[None]:
    """The float32 inputs of a batch are filled with a constant on the device, in two buffers by turns."""
    torch.set_num_threads(job.cores)
    shape = (job.batch_size, job.spec.num_channels, job.spec.crop_px, job.spec.crop_px)
    buffers = [torch.empty(shape, device=job.device) for _ in range(2)]
    for step in count():
        buffers[step % 2].fill_(float(step))
        yield


def extents(index: Index, draw: Draw, job: Job) -> list[tuple[int, int, int]]:
    """(shard, first byte, bytes) of the contiguous runs that hold the samples of a batch, one for each clip touched."""
    tables = [index.entries[kind] for kind in job.spec.kinds]
    found = []
    for video, tau in zip(draw.video.tolist(), draw.tau.tolist(), strict=True):
        frames = np.arange(tau, tau + job.spec.steps)
        for clip in np.unique(frames // CLIP_FRAMES):
            rows = index.first_row[video] + frames[frames // CLIP_FRAMES == clip]
            begin = min(int(table["offset"][rows].min()) for table in tables)
            end = max(int((table["offset"][rows] + table["size"][rows]).max()) for table in tables)
            found.append((int(index.shard[video]), begin, end - begin))
    return found


def _draws(job: Job, num_batches: int) -> list[Draw]:
    index = open_index(job.root)
    videos = population(index, index.split(job.split), job.spec)
    return [draw_batch(job.seed, step, videos, job.spec, job.batch_size) for step in range(num_batches)]


def _encoded(job: Job) -> list[Encoded]:
    source = Source(open_index(job.root), job.spec)
    return [source.read(draw.video, draw.tau, job.spec.steps) for draw in _draws(job, _NUM_DECODED)]


class _Work(torch.utils.data.Dataset):
    """Item i does the work of batch i, the batches taken by turns."""

    def __init__(self, work: Callable[[Any], None], batches: list[Any]):
        self.work, self.batches = work, batches

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, item: int) -> int:
        self.work(self.batches[item % len(self.batches)])
        return item


def _in_workers(work: Callable[[Any], None], batches: list[Any], job: Job) -> Iterator[None]:
    """Endless work on batches in the job's worker processes: threads would wait for one another's Python."""
    for _ in torch.utils.data.DataLoader(_Work(work, batches), batch_size=None, num_workers=job.workers):
        yield
