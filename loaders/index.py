"""A packed data set, opened: videos, labels, splits, and where every member lies. Memory mapped, shared, read-only."""

import hashlib
import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flow.codec import Codec
from flow.command import MAX_COMPARED, did_you_mean
from flow.index import Arrays, decode_names, load_set
from flow.shard import ShardError
from flow.store import is_url
from flow.untrusted import MAX_LIST_BYTES, read_bounded
from loaders.cache import ShardCache, default_folder

Ints = npt.NDArray[np.int64]

_CHUNK = 16_384


class Index:
    """Tables of a packed data set.

    location: its folder or URL.                   metadata: content of dataset.json
    root: its folder; of a URL, that of its cache  cache: of a URL; else None
    classes: names, label k is classes[k].         codec: how components are encoded
    labels, num_frames, heights, widths: (num_videos,) int64; sizes in px
    shards, shard_bytes: file names and sizes.     entries: kind -> (num_rows,) RGB_ENTRY or FIELD_ENTRY
    first_row (num_videos,): frame t of video v is row first_row[v] + t of every kind
    """

    def __init__(
        self,
        root: Path,
        metadata: dict[str, Any],
        header: dict[str, Any],
        arrays: Arrays,
        cache: ShardCache | None = None,
    ):
        self.root, self.cache = root, cache
        self.location = cache.url if cache else str(root)
        self.metadata = metadata
        self.codec = Codec.from_metadata(metadata["codec"])
        self.classes: list[str] = [c["name"] for c in header["classes"]]
        self.shards: list[str] = [s["name"] for s in header["shards"]]
        self.shard_bytes: list[int] = [s["bytes"] for s in header["shards"]]
        videos = arrays["videos"]
        self._videos, self._names = videos, arrays["names"]
        self.num_videos = len(videos)
        self.entries = {kind: array for kind, array in arrays.items() if kind not in ("videos", "names")}

    @cached_property
    def labels(self) -> Ints:
        return self._videos["label"].astype(np.int64)

    @cached_property
    def num_frames(self) -> Ints:
        return self._videos["num_frames"].astype(np.int64)

    @cached_property
    def heights(self) -> Ints:
        return self._videos["height"].astype(np.int64)

    @cached_property
    def widths(self) -> Ints:
        return self._videos["width"].astype(np.int64)

    @cached_property
    def first_row(self) -> Ints:
        return self._videos["first_row"].astype(np.int64)

    @cached_property
    def shard(self) -> Ints:
        return self._videos["shard"].astype(np.int64)

    @property
    def fingerprint(self) -> str:
        """Identity of the packed bytes: changes with any byte of any shard."""
        digests = "".join(shard["sha256"] for shard in self.metadata["shards"])
        return hashlib.sha256(digests.encode()).hexdigest()[:16]

    def open_shard(self, number: int) -> int:
        """Descriptor of a shard, to be closed. From a cache it is waited for, and the thread may hold no other one.

        Raises OSError; of a cache as `ShardCache.open_file` does.
        """
        if self.cache:
            return self.cache.open_file(self.shards[number])
        return os.open(self.root / self.shards[number], os.O_RDONLY | os.O_CLOEXEC)

    def video_ids(self, rows: Iterable[int]) -> list[str]:
        """Ids of the videos in the given rows. Raises ShardError for one that no pack writes."""
        return decode_names(self._names, self._videos[np.fromiter(rows, np.int64)])

    def rows(self, video_ids: Iterable[str]) -> Ints:
        """Rows of the given videos, in that order. Raises ValueError for a video that is not there."""
        return self._rows_of("".join(f"{video_id}\n" for video_id in video_ids).encode(), "")

    def _rows_of(self, lines: bytes, file: str) -> Ints:
        """Rows of the videos whose ids stand in UTF-8 lines, of a file if it has a name.

        Found by sorted hashes, all in numpy, and forgotten: a dict of a million ids would take seconds and 200 MB in
        every process.
        """
        text = np.frombuffer(lines, np.uint8)
        ends = np.flatnonzero(text == ord("\n"))
        wanted = _Names(text, np.concatenate([[0], ends + 1])[:-1], np.diff(ends, prepend=-1) - 1)
        ids = _Names(self._names, self._videos["name_at"].astype(np.int64), self._videos["name_bytes"].astype(np.int64))
        hashes, wanted_hashes = ids.hashes(), wanted.hashes()
        order, wanted_order = np.argsort(hashes), np.argsort(wanted_hashes)
        hashes = hashes[order]
        rows = np.empty(len(ends), np.int64)  # a search in order is ten times faster than one at random
        rows[wanted_order] = order[np.searchsorted(hashes, wanted_hashes[wanted_order]) % self.num_videos]
        for i in np.flatnonzero(~ids.equal(rows, wanted)).tolist():  # missing, or behind another id of the same hash
            name = wanted.name(i)
            alike = slice(*(np.searchsorted(hashes, wanted_hashes[i], side) for side in ("left", "right")))
            found = [row for row in order[alike].tolist() if ids.name(row) == name]
            if not found:
                shown = name[:200].decode("utf-8", "replace")
                if file:
                    remedy = f", which {file} lists. Correct the list, or pack the set again."
                else:
                    remedy = f".{_nearest_video(name, ids) or ' Lists in splits/ name those that it holds.'}"
                raise ValueError(f"{self.location} holds no video {shown!r}{remedy}")
            rows[i] = found[0]
        return rows

    def splits(self) -> list[str]:
        """Names of the lists in splits/, such as "split1_train"."""
        if self.cache:
            return self.cache.lists()
        return sorted(path.stem for path in (self.root / "splits").glob("*.txt"))

    def split(self, name: str) -> Ints:
        """Rows of a list in splits/, or for "all" of every packed video.

        Raises ValueError if there is no such list, or it names a missing video.
        """
        if name == "all":
            return np.arange(self.num_videos)
        if name not in self.splits():
            near = did_you_mean(name, [*self.splits(), "all"])
            lists = ", ".join(self.splits()) or "none"
            raise ValueError(f"{self.location} has no list {name!r}; it has {lists}.{near}")
        path = self.root / "splits" / f"{name}.txt"
        if self.cache:
            os.close(self.cache.open_file(f"splits/{path.name}"))  # the folder may have been deleted
        lines = read_bounded(path, MAX_LIST_BYTES)
        return self._rows_of(lines if lines.endswith(b"\n") else lines + b"\n" * bool(lines), f"splits/{path.name}")


@dataclass(frozen=True)
class _Names:
    """Names in UTF-8: name i is text[at[i] : at[i] + size[i]]. A million of them are three arrays."""

    text: npt.NDArray[np.uint8]
    at: Ints
    size: Ints

    def name(self, i: int) -> bytes:
        return self.text[self.at[i] : self.at[i] + self.size[i]].tobytes()

    def hashes(self) -> npt.NDArray[np.uint64]:
        """sum_j (byte_j + 1) p^j mod 2^64 of every name."""
        powers = np.cumprod(np.full(self.size.max(initial=0) + 1, 0x9E3779B97F4A7C15, np.uint64))
        found = np.zeros(len(self.at), np.uint64)
        for chunk in _chunks(len(found)):
            flat, starts, within = self._flat(np.arange(chunk.start, chunk.stop))
            terms = (self.text[flat] + np.uint64(1)) * powers[within]
            found[chunk] = np.add.reduceat(np.append(terms, np.uint64(0)), starts)
        return found

    def equal(self, rows: Ints, others: "_Names") -> npt.NDArray[np.bool_]:
        """Whether name rows[i] is the others' name i, for every i."""
        same = self.size[rows] == others.size
        for chunk in _chunks(len(rows)):
            numbers = np.arange(chunk.start, chunk.stop)[same[chunk]]
            flat, starts, _ = self._flat(rows[numbers])
            differs = self.text[flat] != others.text[others._flat(numbers)[0]]
            same[numbers] = np.add.reduceat(np.append(differs, False), starts, dtype=np.int64) == 0
        return same

    def _flat(self, numbers: Ints) -> tuple[Ints, Ints, Ints]:
        """Places in the text of all bytes of some names; where each name starts among them; each byte's place in it."""
        size = self.size[numbers]
        starts = np.cumsum(size) - size
        within = np.arange(size.sum()) - np.repeat(starts, size)
        return within + np.repeat(self.at[numbers], size), starts, within


def _nearest_video(name: bytes, ids: _Names) -> str:
    """The id most like one that is not there, as a question; "" if none is. ids: in order; of millions of them those
    are compared between which it would stand."""
    at = bisect_left(range(len(ids.at)), name, key=ids.name)
    first = max(0, at - MAX_COMPARED // 2)
    around = range(first, min(first + MAX_COMPARED, len(ids.at)))
    return did_you_mean(name.decode("utf-8", "replace"), (ids.name(i).decode("utf-8", "replace") for i in around))


def _chunks(count: int) -> Iterator[slice]:
    """Slices that keep what is computed for a name's every byte small."""
    return (slice(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK))


def open_index(root: str | Path, *, cache: str | Path = "", cache_gb: float = 100.0) -> Index:
    """Open a packed data set, in a folder or at a URL; see `flow.store`.

    Args:
        cache, cache_gb: of a URL, the folder that shards are cached in, empty for `cache.default_folder`, and the most
            that all in it may take, 10^9 bytes.
    Raises ValueError if the folder is none or its encoding is not the one this code reads, and ShardError if metadata,
    index and shards do not belong together; for a URL as `ShardCache.open` too.
    """
    if is_url(root):
        return _open_cached(ShardCache.open(str(root), Path(cache or default_folder()), int(cache_gb * 1e9)))
    root = Path(root)
    metadata, header, arrays = load_set(root)
    for shard in metadata["shards"]:
        path, num_bytes = root / shard["name"], shard["bytes"]
        found = path.stat().st_size if path.is_file() else None  # a FIFO or device is none
        if found != num_bytes:
            raise ShardError(
                f"{path}: {'missing' if found is None else f'{found} bytes'}, dataset.json says {num_bytes} bytes. "
                "Restore the shard from a copy, or pack the set again."
            )
    return Index(root, metadata, header, arrays)


def _open_cached(cache: ShardCache) -> Index:
    """Open a cached set; an index that is damaged in the cache alone is fetched again."""
    try:
        return Index(cache.folder, *load_set(cache.folder), cache)
    except ShardError as error:
        if not cache.repair_index():
            raise ShardError(f"{cache.url}: {error}") from None
    return Index(cache.folder, *load_set(cache.folder), cache)
