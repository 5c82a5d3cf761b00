"""Encoded bytes of drawn samples, read from the shards and checked before anything decodes them.

A damaged JPEG header, or a region outside the image, ends the process inside the decoder. So every member's CRC-32 and
coded size are compared with the index here; what is damaged becomes a ShardError that names shard, member and offset.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flow.codec import frame_header
from flow.shard import CLIP_FRAMES, ShardError, damage, member_name
from loaders.batch import StreamSpec
from loaders.index import Index, Ints

_MAX_OPEN_SHARDS = 256
_REBUILD = "Rebuild the index with `python -m flow.verify DIR --rebuild-index`."


@dataclass(frozen=True)
class Encoded:
    """Encoded images of n runs of consecutive time steps.

    images: n * steps * kinds uint8 arrays: for run i its time steps, and within one, dx then dy (or one RGB frame).
    Views of `buffer`, valid until it is given back with `Source.release`.
    video, first (n,): row of the index and first frame or field of each run
    """

    images: list[npt.NDArray[np.uint8]]
    video: Ints
    first: Ints
    steps: int
    buffer: bytearray


class Source:
    """Reads runs of time steps from the shards of a packed set. Any number of threads may read at a time."""

    def __init__(self, index: Index, spec: StreamSpec):
        missing = [kind for kind in spec.kinds if kind not in index.entries]
        if missing:
            raise ValueError(
                f"{index.root} holds no {', '.join(missing)} members; it has {', '.join(index.entries)}. "
                f"The {spec.stream} stream needs {', '.join(spec.kinds)}: pack the videos again."
            )
        self.index = index
        self.spec = spec
        self._tables = [index.entries[kind] for kind in spec.kinds]
        self._files: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()
        self._buffers: list[bytearray] = []
        self._headers: dict[tuple[int, int, int], bytes] = {}

    def frames(self, video: Ints, first: Ints, steps: int) -> Ints:
        """Frame numbers (n, steps) of runs. A video that ends before repeats its last frame or field.

        num_frames = 4, steps = 5, first = 0     fields 0 1 2 2 2
        """
        last = self.index.num_frames[video] - (1 if self.spec.stream == "spatial" else 2)
        return np.minimum(first[:, None] + np.arange(steps), last[:, None])

    def entries(self, video: Ints, first: Ints, steps: int) -> npt.NDArray[Any]:
        """Index entries (n, steps, kinds) of runs; those of components have range and mean in px/frame."""
        rows = self.index.first_row[video][:, None] + self.frames(video, first, steps)
        return np.stack([table[rows] for table in self._tables], axis=-1)

    def read(self, video: Ints, first: Ints, steps: int) -> Encoded:
        """Read and check the members of runs: one contiguous read for each clip that a run touches.

        Raises ShardError for a damaged member.
        """
        reads = list(self._reads(video, first, steps))
        buffer = self._buffer(sum(read.end - read.begin for read in reads))
        files = self._open_files({read.shard for read in reads})
        images: list[npt.NDArray[np.uint8]] = []
        try:
            for read in reads:  # what is not in the system's cache is fetched many pieces at a time, ahead of need
                os.posix_fadvise(files[read.shard], read.begin, read.end - read.begin, os.POSIX_FADV_WILLNEED)
            at = 0
            for read in reads:
                images += self._read(read, files[read.shard], buffer, at)
                at += read.end - read.begin
        finally:
            for file in files.values():
                os.close(file)
        return Encoded(images, video, first, steps, buffer)

    def release(self, encoded: Encoded) -> None:
        """Give an Encoded's buffer back: fresh memory for every batch would cost more than reading into it."""
        self._buffers.append(encoded.buffer)

    def _reads(self, video: Ints, first: Ints, steps: int) -> Iterator["_Read"]:
        """The contiguous pieces of runs, in order. Raises ShardError if one lies outside its shard."""
        frames, entries = self.frames(video, first, steps), self.entries(video, first, steps)
        begins = entries["offset"].min(axis=2).tolist()
        ends = (entries["offset"] + entries["size"]).max(axis=2).tolist()
        clips = (frames // CLIP_FRAMES).tolist()
        for run, (row, start) in enumerate(zip(video.tolist(), first.tolist(), strict=True)):
            shard = int(self.index.shard[row])
            step = 0
            while step < steps:
                stop = step + clips[run][step:].count(clips[run][step])
                begin, end = begins[run][step], ends[run][stop - 1]
                if not 0 <= begin <= end <= self.index.shard_bytes[shard]:
                    raise ShardError(
                        f"{self.where(row, start + step, 0)}: the index points beyond the shard's end. {_REBUILD}"
                    )
                yield _Read(row, shard, start + step, begin, end, entries[run, step:stop])
                step = stop

    def _read(self, read: "_Read", file: int, buffer: bytearray, at: int) -> list[npt.NDArray[np.uint8]]:
        """Checked images of one piece, read to buffer[at:]."""
        content = memoryview(buffer)[at : at + read.end - read.begin]
        size = os.preadv(file, [content], read.begin)
        kinds = len(self.spec.kinds)
        expected = (int(self.index.heights[read.video]), int(self.index.widths[read.video]), 3 if kinds == 1 else 1)
        header = self._headers.get(expected, b"-")
        flat = read.entries.reshape(-1)
        images = []
        for i, (offset, length, crc32) in enumerate(
            zip(flat["offset"].tolist(), flat["size"].tolist(), flat["crc32"].tolist(), strict=True)
        ):
            begin = at + offset - read.begin
            jpeg = content[begin - at : max(begin - at, min(begin - at + length, size))]
            wrong = damage(jpeg, length, crc32)
            if not wrong and not buffer.startswith(header, begin):
                wrong = self._wrong_size(jpeg, expected)
            if wrong:
                raise ShardError(f"{self.where(read.video, read.first + i // kinds, i % kinds)}: {wrong}")
            images.append(np.frombuffer(buffer, np.uint8, length, begin))
        return images

    def _wrong_size(self, jpeg: memoryview, expected: tuple[int, int, int]) -> str:
        """What is wrong with a JPEG's coded (height, width, channels); empty if they are the expected ones.

        One encoder writes the same header for all images of a size, so the last good one is remembered up to its end,
        and images that begin with it need no parsing.
        """
        try:
            found, end = frame_header(bytes(jpeg))
        except ValueError as error:
            return str(error)
        if found != expected:
            return (
                f"a JPEG of {found[0]}x{found[1]} px and {found[2]} channels, the index says {expected[0]}x"
                f"{expected[1]} and {expected[2]}. {_REBUILD}"
            )
        self._headers[expected] = bytes(jpeg[:end])
        return ""

    def where(self, video: int, frame: int, kind: int) -> str:
        """Shard, member and offset of one image, for messages; kind counts within a time step."""
        frame = int(self.frames(np.array([video]), np.array([frame]), 1)[0, 0])
        entry = self._tables[kind][int(self.index.first_row[video]) + frame]
        name = member_name(
            self.index.video_ids([video])[0], frame // CLIP_FRAMES, self.spec.kinds[kind], frame % CLIP_FRAMES
        )
        return f"{self.index.shards[int(self.index.shard[video])]}: {name} at offset {int(entry['offset'])}"

    def _buffer(self, num_bytes: int) -> bytearray:
        """A buffer of at least that size, used ones first."""
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = bytearray()
        return buffer if len(buffer) >= num_bytes else bytearray(num_bytes + num_bytes // 4)

    def _open_files(self, shards: set[int]) -> dict[int, int]:
        """Descriptors of shards, the caller's own to close: one shared with other threads might be closed under it.

        Of the source's own, the least recently used one is closed when too many are open.
        """
        files = {}
        with self._lock:
            for shard in shards:
                if shard not in self._files:
                    if len(self._files) >= _MAX_OPEN_SHARDS:
                        os.close(self._files.popitem(last=False)[1])
                    path = self.index.root / self.index.shards[shard]
                    self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._files.move_to_end(shard)
                files[shard] = os.dup(self._files[shard])
        return files

    def close(self) -> None:
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])


@dataclass(frozen=True)
class _Read:
    """One contiguous read: bytes [begin, end) of a shard, with a video's entries (steps, kinds) from `first` on."""

    video: int
    shard: int
    first: int
    begin: int
    end: int
    entries: npt.NDArray[Any]
