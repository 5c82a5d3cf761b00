"""Encoded bytes of drawn samples, read from the shards and checked before anything decodes them.

A damaged JPEG header, or a region outside the image, ends the process inside the decoder. So every member's CRC-32 and
coded size are compared with the index here; what is damaged becomes a ShardError that names shard, member and offset.
"""

import os
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from flow.codec import coded_size
from flow.shard import CLIP_FRAMES, ShardError, damage, member_name
from loaders.batch import StreamSpec
from loaders.draw import Draw
from loaders.index import Index

_MAX_OPEN_SHARDS = 256
#: A libjpeg header up to the image's size fits in this many bytes, so headers repeat and parsing them can be cached.
_PREFIX_BYTES = 192
_REBUILD = "Rebuild the index with `python -m flow.verify DIR --rebuild-index`."


@dataclass(frozen=True)
class Encoded:
    """Encoded images of one batch of n samples.

    images: n * num_images uint8 arrays: for sample i its time steps, and within one, dx then dy (or one RGB frame)
    entries (n, steps, kinds): index entries of the same images, with range and mean of components in px/frame
    draw: what was drawn
    """

    images: list[npt.NDArray[np.uint8]]
    entries: npt.NDArray[Any]
    draw: Draw


@lru_cache(maxsize=4096)
def _size_of_prefix(prefix: bytes) -> tuple[int, int, int] | None:
    """Coded size if the frame header lies within the prefix, so that the prefix alone determines it."""
    try:
        return coded_size(prefix)
    except ValueError:
        return None


def _wrong_size(jpeg: memoryview, expected: tuple[int, int, int]) -> str:
    """What is wrong with a JPEG's coded (height, width, channels); empty if they are the expected ones."""
    try:
        found = _size_of_prefix(bytes(jpeg[:_PREFIX_BYTES])) or coded_size(bytes(jpeg))
    except ValueError as error:
        return str(error)
    if found == expected:
        return ""
    return (
        f"a JPEG of {found[0]}x{found[1]} px and {found[2]} channels, the index says {expected[0]}x{expected[1]} and "
        f"{expected[2]}. {_REBUILD}"
    )


class Source:
    """Reads samples from the shards of a packed set. For one thread."""

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

    def frames(self, draw: Draw) -> npt.NDArray[np.int64]:
        """Frame numbers (n, steps) of the drawn samples. A video too short for L repeats its last field.

        num_frames = 4, L = 5, tau = 0     fields 0 1 2 2 2
        """
        last = self.index.num_frames[draw.video] - (1 if self.spec.stream == "spatial" else 2)
        return np.minimum(draw.tau[:, None] + np.arange(self.spec.steps), last[:, None])

    def read(self, draw: Draw) -> Encoded:
        """Read and check the members of a batch: one contiguous read for each clip that a sample touches.

        Raises ShardError for a damaged member.
        """
        frames = self.frames(draw)  # (n, steps)
        rows = self.index.first_row[draw.video][:, None] + frames
        # (n, steps, kinds)
        entries = np.stack([table[rows] for table in self._tables], axis=-1)
        begins = entries["offset"].min(axis=2).tolist()
        ends = (entries["offset"] + entries["size"]).max(axis=2).tolist()
        images: list[npt.NDArray[np.uint8]] = []
        for sample in range(len(draw)):
            clips = (frames[sample] // CLIP_FRAMES).tolist()
            step = 0
            while step < len(clips):
                stop = step + clips[step:].count(clips[step])
                images += self._read_run(
                    draw,
                    sample,
                    frames[sample],
                    step,
                    entries[sample, step:stop],
                    begins[sample][step],
                    ends[sample][stop - 1],
                )
                step = stop
        return Encoded(images, entries, draw)

    def _read_run(
        self, draw: Draw, sample: int, frames: Any, step: int, entries: npt.NDArray[Any], begin: int, end: int
    ) -> list[npt.NDArray[np.uint8]]:
        """Checked images of consecutive time steps within one clip; entries (steps, kinds)."""
        video = int(draw.video[sample])
        shard = int(self.index.shard[video])
        kinds = len(self.spec.kinds)
        if end > self.index.shard_bytes[shard]:
            raise ShardError(
                f"{self.where(draw, sample, step * kinds)}: the index points beyond the shard's end. {_REBUILD}"
            )
        content = memoryview(os.pread(self._file(shard), end - begin, begin))
        expected = (int(self.index.heights[video]), int(self.index.widths[video]), 3 if kinds == 1 else 1)
        flat = entries.reshape(-1)
        images = []
        for i, (offset, size, crc32) in enumerate(
            zip(flat["offset"].tolist(), flat["size"].tolist(), flat["crc32"].tolist(), strict=True)
        ):
            jpeg = content[offset - begin : offset - begin + size]
            if wrong := damage(jpeg, size, crc32) or _wrong_size(jpeg, expected):
                raise ShardError(f"{self.where(draw, sample, step * kinds + i)}: {wrong}")
            images.append(np.frombuffer(jpeg, np.uint8))
        return images

    def where(self, draw: Draw, sample: int, image: int) -> str:
        """Shard, member and offset of one image of a drawn sample, for messages."""
        step, kind = divmod(image, len(self.spec.kinds))
        video = int(draw.video[sample])
        frame = int(self.frames(draw)[sample, step])
        entry = self._tables[kind][int(self.index.first_row[video]) + frame]
        name = member_name(
            self.index.video_ids([video])[0], frame // CLIP_FRAMES, self.spec.kinds[kind], frame % CLIP_FRAMES
        )
        return f"{self.index.shards[int(self.index.shard[video])]}: {name} at offset {int(entry['offset'])}"

    def _file(self, shard: int) -> int:
        """Descriptor of a shard; the least recently used one is closed when too many are open."""
        if shard not in self._files:
            if len(self._files) >= _MAX_OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.index.root / self.index.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
        self._files.move_to_end(shard)
        return self._files[shard]

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])
