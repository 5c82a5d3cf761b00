"""Encoded bytes of drawn samples, read from the shards and checked before anything decodes them.

A damaged JPEG header, or a region outside the image, ends the process inside the decoder. So every member's CRC-32 and
coded size are compared with the index here; what is damaged becomes a SampleError that names shard, member and offset.
"""

import errno
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from flow.clips import damage
from flow.codec import JPEG_END, MAX_SCANS, frame_header, max_jpeg_bytes, sound_ranges
from flow.index import take_entries
from flow.shard import CLIP_FRAMES, RGB_ENTRY, ShardError, member_name
from loaders.ahead import Fetcher
from loaders.batch import StreamSpec
from loaders.index import Index, Ints
from loaders.rescale import vector_scale

logger = logging.getLogger(__name__)

#: Of one thread.
_MAX_OPEN_SHARDS = 128
#: Takes what lies between members, tar headers and padding; written by all threads, read by none.
_SCRATCH = memoryview(bytearray(65_536))
#: Buffers of one system call; the system's limit is 1,024.
_MAX_PARTS = 1000
_REBUILD = "Rebuild the index with `python -m flow.verify DIR --rebuild-index`."
_RESTORE = "Restore the shard from a copy, or pack the set again."
#: What a file system says of a shard that is gone, or of a place that it cannot read.
_GONE = (errno.ENOENT, errno.EIO, errno.ESTALE, errno.ENODATA, errno.EBADMSG)


class SampleError(ShardError):
    """Members are damaged. runs: which of the runs that were asked for hold them, or may, where that is not known."""

    def __init__(self, message: str, runs: tuple[int, ...]):
        super().__init__(message)
        self.runs = runs


@dataclass(frozen=True)
class Encoded:
    """Encoded images of n runs of consecutive time steps.

    rows (m, longest) uint8, m = n * steps * kinds: for run i its time steps, and within one, dx then dy (or one RGB
    frame). Image j is rows[j, : sizes[j]]; what follows is left over from other images, and decoders, which stop at an
    image's end, do not look at it. One array, because a graph takes 3 us for each of many, and 20 are but one stack.
    Valid until given back with `Source.release`.
    """

    rows: npt.NDArray[np.uint8]
    sizes: Ints
    buffer: bytearray

    def images(self) -> list[npt.NDArray[np.uint8]]:
        """The images alone."""
        return [row[:size] for row, size in zip(self.rows, self.sizes.tolist(), strict=True)]


class Source:
    """Reads runs of time steps from the shards of a packed set. Any number of threads may read at a time."""

    def __init__(self, index: Index, spec: StreamSpec):
        needed = spec.kinds + spec.backward_kinds
        missing = [kind for kind in needed if kind not in index.entries]
        if missing:
            raise ValueError(
                f"{index.location} holds no {', '.join(missing)} members; it has {', '.join(index.entries)}. "
                f"The {spec.stream} stream needs {', '.join(needed)}: pack the videos again"
                f"{' with --backward' if 'bdx' in missing else ''}."
            )
        self.index = index
        self.spec = spec
        if spec.follows_trajectories and (index.metadata.get("flow") or {}).get("camera"):
            raise ValueError(
                f"{index.location} holds flow less the camera's motion: points cannot be followed through it (sec. "
                "3.1). Take data.stacking=flow, or pack the set without --camera."
            )
        self._tables = [[index.entries[kind] for kind in kinds] for kinds in (spec.kinds, spec.backward_kinds)]
        ahead = np.arange(spec.window_steps)
        self._backward = ahead >= spec.chain_steps if spec.backward_kinds else np.zeros(len(ahead), bool)
        self._offsets = np.where(self._backward, spec.chain_steps - ahead, ahead)  # of each time step's frame from tau
        self._own = threading.local()
        self._files: list[OrderedDict[int, int]] = []
        self._buffers: list[bytearray] = []
        self._headers: dict[tuple[int, int, int], bytes] = {}
        self._waits: dict[int, _Read] = {}  # by thread
        self._fetcher = Fetcher(index) if index.cache else None
        self._num_failures = 0
        self._stopped = False

    def frames(self, video: Ints, tau: Ints, steps: int) -> Ints:
        """Frame numbers (n, steps) of runs. A video that ends before repeats its last frame or field.

        num_frames = 4, steps = 5, tau = 0                     fields 0 1 2 2 2
        num_frames = 9, steps = 6, tau = 4, bi-directional     fields 4 5 6, backward ones 4 3 2
        """
        backward = self._backward[:steps]
        last = self.index.num_frames[video][:, None] - np.where(backward | (not self.spec.is_temporal), 1, 2)
        return np.clip(tau[:, None] + self._offsets[:steps], backward.astype(np.int64), last)  # b_1 is the first one

    def entries(self, video: Ints, tau: Ints, steps: int) -> npt.NDArray[Any]:
        """Index entries (n, steps, kinds) of runs; those of components have range and mean in px/frame, of rescaled
        frames if the spec asks for them: codes stand for what the range says, so nobody else has to scale vectors.
        """
        entries = self.stored_entries(video, tau, steps)
        if self.spec.is_temporal and self.spec.size_px is not None:
            scale = vector_scale(self.index, video, self.spec)[:, None, :].astype(np.float32)
            for key in ("lo", "hi", "mean"):
                entries[key] *= scale
        return entries

    def stored_entries(self, video: Ints, tau: Ints, steps: int) -> npt.NDArray[Any]:
        """The same in px/frame of the stored frames."""
        rows = self.index.first_row[video][:, None] + self.frames(video, tau, steps)
        ahead = int((~self._backward[:steps]).sum())  # the forward time steps come first
        kinds = (self.spec.kinds, self.spec.backward_kinds)
        parts = zip(self._tables, kinds, (rows[:, :ahead], rows[:, ahead:]), strict=True)
        taken = [
            np.stack([take_entries(table, kind, part) for table, kind in zip(tables, names, strict=True)], axis=-1)
            for tables, names, part in parts
            if tables
        ]
        return np.concatenate(taken, axis=1)

    def read(self, video: Ints, tau: Ints, steps: int) -> Encoded:
        """Read and check the members of runs: one contiguous read for each clip, and direction, that a run touches.

        Raises SampleError for a damaged member, OSError for a file system that fails. Shards are opened again then. A
        shard that is damaged in its cache alone is fetched and read again.
        """
        if self._stopped:
            raise ValueError("This source was closed. Open another one.")
        repaired: set[int] = set()
        while True:
            try:
                return self._read_runs(video, tau, steps)
            except (SampleError, OSError) as error:
                self._num_failures += 1
                # What could not be fetched is not repaired by fetching it once more.
                if not isinstance(error, SampleError) or isinstance(error.__cause__, FileNotFoundError | ShardError):
                    raise
                if not self._repair(video[list(error.runs)], repaired):
                    raise

    def _repair(self, video: Ints, repaired: set[int]) -> bool:
        """Whether the shards of some videos were damaged in their cache, and are not among those repaired before."""
        cache, found = self.index.cache, False
        for shard in set(self.index.shard[video].tolist()) - repaired if cache else ():
            repaired.add(shard)
            name = self.index.shards[shard]
            if cache and cache.repair(name):
                logger.warning("%s/%s: its copy in the cache is damaged, and fetched again", cache.url, name)
                found = True
        return found

    def ask(self, shards: list[int], *, now: bool = False) -> list[int]:
        """Tell that shards are needed, later or now. Returns those that are not there; of a set in a folder all are."""
        return self._fetcher.ask(shards, now=now) if self._fetcher else []

    def _read_runs(self, video: Ints, tau: Ints, steps: int) -> Encoded:
        entries = self.stored_entries(video, tau, steps)
        self._check_numbers(entries, video, tau)
        sizes = entries["size"].reshape(-1).astype(np.int64)
        self._check_sizes(sizes, video, tau, steps)
        reads = sorted(self._reads(video, tau, steps, entries), key=lambda read: (read.shard, read.begin))
        longest = int(sizes.max(initial=0))
        buffer = self._buffer(len(sizes) * longest)
        kinds = len(self.spec.kinds)
        for group in self._groups(reads):
            try:
                for read in group:  # what is not in the system's cache is fetched many pieces at a time, ahead of need
                    with self._waiting(read) as file:
                        os.posix_fadvise(file, read.begin, read.end - read.begin, os.POSIX_FADV_WILLNEED)
                for read in group:
                    self._read(read, buffer, (read.run * steps + read.step) * kinds * longest, longest)
            finally:
                if self._fetcher:
                    self._close_own()
        rows = np.frombuffer(buffer, np.uint8, len(sizes) * longest).reshape(len(sizes), longest)
        return Encoded(rows, sizes, buffer)

    def _groups(self, reads: list["_Read"]) -> Iterator[list["_Read"]]:
        """Reads in groups, each of as many shards as may be open at a time.

        Of a cache that is one: a thread that has to wait for a shard must keep none from being taken away.
        """
        shards = list(dict.fromkeys(read.shard for read in reads))
        self.ask(shards[1:], now=True)
        size = 1 if self._fetcher else _MAX_OPEN_SHARDS
        group_of = {shard: i // size for i, shard in enumerate(shards)}
        return (list(group) for _, group in groupby(reads, lambda read: group_of[read.shard]))

    def _check_numbers(self, entries: npt.NDArray[Any], video: Ints, tau: Ints) -> None:
        """Raise SampleError for a range or mean, px/frame, that no field has: what came of it would be no number."""
        if not self.spec.is_temporal:
            return
        sound = sound_ranges(entries["lo"], entries["hi"], entries["mean"])
        for run, step, kind in np.argwhere(~sound)[:1].tolist():
            place = self.where(int(video[run]), int(tau[run]), step, kind)
            raise SampleError(f"{place}: its range or mean in the index is none of a field. {_REBUILD}", (run,))

    def _check_sizes(self, sizes: Ints, video: Ints, tau: Ints, steps: int) -> None:
        """Raise SampleError for sizes that no image has: the index would make us ask for more memory than any needs."""
        kinds = len(self.spec.kinds)
        allowed = max_jpeg_bytes(self.index.heights[video], self.index.widths[video], 3 if kinds == 1 else 1)
        allowed = allowed.repeat(steps * kinds)
        for image in np.flatnonzero((sizes == 0) | (sizes > allowed))[:1].tolist():
            step, kind = divmod(image, kinds)
            run, step = divmod(step, steps)
            raise SampleError(
                f"{self.where(int(video[run]), int(tau[run]), step, kind)}: {sizes[image]} bytes by the index, a JPEG "
                f"of this size has 1 to {allowed[image]}. {_REBUILD}",
                (run,),
            )

    def release(self, encoded: Encoded) -> None:
        """Give an Encoded's buffer back: fresh memory for every batch would cost more than reading into it."""
        self._buffers.append(encoded.buffer)

    def _reads(self, video: Ints, tau: Ints, steps: int, entries: npt.NDArray[Any]) -> Iterator["_Read"]:
        """The contiguous pieces of runs, in order. Raises SampleError if one lies outside its shard."""
        begins = entries["offset"].min(axis=2).tolist()
        ends = np.maximum(entries["offset"] + entries["size"], entries["offset"]).max(axis=2).tolist()  # it may wrap
        # Forward and backward fields of a clip stand apart.
        pieces = (self.frames(video, tau, steps) // CLIP_FRAMES * 2 + self._backward[:steps]).tolist()
        for run, (row, start) in enumerate(zip(video.tolist(), tau.tolist(), strict=True)):
            shard = int(self.index.shard[row])
            step = 0
            while step < steps:
                stop = step + pieces[run][step:].count(pieces[run][step])
                begin, end = min(begins[run][step:stop]), max(ends[run][step:stop])
                if not 0 <= begin <= end <= self.index.shard_bytes[shard]:
                    raise SampleError(
                        f"{self.where(row, start, step, 0)}: the index points beyond the shard's end. {_REBUILD}",
                        (run,),
                    )
                yield _Read(run, row, start, shard, step, begin, end, entries[run, step:stop])
                step = stop

    @contextmanager
    def _waiting(self, read: "_Read") -> Iterator[int]:
        """The shard's descriptor, while `waits` tells that this thread waits for it. Raises SampleError if it is gone,
        or cannot be read there, or is another one in the store than was packed."""
        thread = threading.get_ident()
        self._waits[thread] = read
        try:
            yield self._file(read.shard)
        except ShardError as error:  # of the cache
            raise SampleError(f"{self.where(read.video, read.tau, read.step, 0)}: {error}", (read.run,)) from error
        except OSError as error:
            if error.errno not in _GONE:
                raise
            place = self.where(read.video, read.tau, read.step, 0)
            raise SampleError(f"{place}: cannot be read ({error.strerror}). {_RESTORE}", (read.run,)) from error
        finally:
            del self._waits[thread]

    def waits(self) -> str:
        """What threads wait for now: shards and offsets, for messages."""
        reads = list(self._waits.values())
        return ", ".join(
            f"{self.index.location}/{self.index.shards[read.shard]} at offset {read.begin}" for read in reads
        )

    def _read(self, read: "_Read", buffer: bytearray, at: int, longest: int) -> None:
        """Read the images of one piece to buffer[at:], one every `longest` bytes, and check them."""
        kinds, content = len(self.spec.kinds), memoryview(buffer)
        keys = ("offset", "size", "crc32")
        members = list(zip(*(read.entries[key].reshape(-1).tolist() for key in keys), strict=True))
        begins = range(at, at + len(members) * longest, longest)
        rows = [content[begin : begin + size] for begin, (_, size, _) in zip(begins, members, strict=True)]
        places = [member[:2] for member in members]
        order = sorted(range(len(members)), key=places.__getitem__)  # backward fields come last one first
        same = [i for i, j in zip(order[1:], order, strict=False) if places[i] == places[j]]  # a video's end
        once = [i for i in order if i not in same]
        with self._waiting(read) as file:
            end = _scatter(file, [places[i][0] for i in once], [rows[i] for i in once])
        copied = {places[i]: rows[i] for i in once} if same else {}
        for i in same:
            rows[i][:] = copied[places[i]]
        table, width = read.entries.tobytes(), read.entries.itemsize
        expected = (int(self.index.heights[read.video]), int(self.index.widths[read.video]), 3 if kinds == 1 else 1)
        header = self._headers.get(expected, b"-")
        for i, (begin, row, (offset, size, crc32)) in enumerate(zip(begins, rows, members, strict=True)):
            covered = table[i * width + RGB_ENTRY.itemsize : (i + 1) * width]  # the entry's range_bytes
            wrong = damage(row[: max(0, end - offset)], size, crc32, covered)
            if not wrong and (size < len(header) or not buffer.startswith(header, begin)):
                wrong = self._wrong_size(row, expected)
            if not wrong and not buffer.startswith(JPEG_END, begin + size - len(JPEG_END)):
                wrong = (
                    "no end-of-image marker at its end: a decoder would run on into other bytes. Pack the set again."
                )
            if wrong:
                place = self.where(read.video, read.tau, read.step + i // kinds, i % kinds)
                raise SampleError(f"{place}: {wrong}", (read.run,))

    def _wrong_size(self, jpeg: memoryview, expected: tuple[int, int, int]) -> str:
        """What is wrong with a JPEG's coded (height, width, channels); empty if they are the expected ones.

        One encoder writes the same header for all images of a size, so the last good one is remembered up to its end,
        and images that begin with it need no parsing.
        """
        try:
            header = frame_header(bytes(jpeg))
        except ValueError as error:
            return str(error)
        found = header.size
        if found != expected:
            return (
                f"a JPEG of {found[0]}x{found[1]} px and {found[2]} channels, the index says {expected[0]}x"
                f"{expected[1]} and {expected[2]}. {_REBUILD}"
            )
        if header.is_alone:
            self._headers[expected] = bytes(jpeg[: header.num_bytes])
        elif (num_scans := bytes(jpeg).count(b"\xff\xda")) > MAX_SCANS:
            return f"a JPEG of {num_scans} scans, which would take very long; expected at most {MAX_SCANS}."
        return ""

    def where(self, video: int, tau: int, step: int, kind: int) -> str:
        """Shard, member and offset of one image of a run, for messages; kind counts within a time step."""
        frame = int(self.frames(np.array([video]), np.array([tau]), step + 1)[0, step])
        backward = bool(self._backward[step])
        entry = self._tables[backward][kind][int(self.index.first_row[video]) + frame]
        name = (self.spec.backward_kinds if backward else self.spec.kinds)[kind]
        member = member_name(self.index.video_ids([video])[0], frame // CLIP_FRAMES, name, frame % CLIP_FRAMES)
        return f"{self.index.shards[int(self.index.shard[video])]}: {member} at offset {int(entry['offset'])}"

    def _buffer(self, num_bytes: int) -> bytearray:
        """A buffer of at least that size, used ones first."""
        try:
            buffer = self._buffers.pop()
        except IndexError:
            buffer = bytearray()
        return buffer if len(buffer) >= num_bytes else bytearray(num_bytes + num_bytes // 4)

    def _file(self, shard: int) -> int:
        """Descriptor of a shard, good until this thread's next call: each thread has its own, so that none is closed
        under another. The least recently used one is closed when there are too many.
        """
        if not hasattr(self._own, "files"):
            self._own.files, self._own.num_failures = OrderedDict(), 0
            self._files.append(self._own.files)
        files: OrderedDict[int, int] = self._own.files
        if self._own.num_failures != self._num_failures:  # a shard may have been put back: another file of its name
            self._own.num_failures = self._num_failures
            self._close_own()
        if shard not in files:
            if len(files) >= _MAX_OPEN_SHARDS:
                os.close(files.popitem(last=False)[1])
            files[shard] = self.index.open_shard(shard)
        files.move_to_end(shard)
        return files[shard]

    def _close_own(self) -> None:
        """Close this thread's shards."""
        files: OrderedDict[int, int] | None = getattr(self._own, "files", None)
        while files:
            os.close(files.popitem()[1])

    def stop(self) -> None:
        """Begin no more reads."""
        self._stopped = True
        if self._fetcher:
            self._fetcher.stop()

    def close(self) -> None:
        """Close the shards. No thread may read any more."""
        self.stop()
        if self._fetcher:
            self._fetcher.close()
        for files in self._files:
            while files:
                os.close(files.popitem()[1])


def _scatter(file: int, offsets: list[int], rows: list[memoryview]) -> int:
    """Fill each row with the bytes at its offset, what lies between them being read and thrown away: one read, unless
    there are very many or they lie far apart. Returns where the file ended, or the end of the last row.

    Rows that overlap, as only a damaged index has them, begin a new read.
    """
    begin = end = offsets[0]
    parts: list[memoryview] = []
    for offset, row in zip(offsets, rows, strict=True):
        between = offset - end
        if not 0 <= between <= len(_SCRATCH) or len(parts) > _MAX_PARTS:
            if (got := begin + os.preadv(file, parts, begin)) < end:
                return got
            begin, parts, between = offset, [], 0
        if between:
            parts.append(_SCRATCH[:between])
        parts.append(row)
        end = offset + len(row)
    return begin + os.preadv(file, parts, begin)


@dataclass(frozen=True)
class _Read:
    """One contiguous read of a run from time step `step` on: bytes [begin, end) of a shard, entries (steps, kinds)."""

    run: int
    video: int
    tau: int
    shard: int
    step: int
    begin: int
    end: int
    entries: npt.NDArray[Any]
